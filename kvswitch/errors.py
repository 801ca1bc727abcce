"""Every error kvswitch raises on purpose. Each one leaves the state as it was."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "HostMemoryExhausted",
    "IntegrityError",
    "InvalidTransition",
    "KVSwitchError",
    "OutOfBlocks",
    "TransferError",
    "UnknownSequence",
]


class KVSwitchError(Exception):
    """Base of all errors raised by kvswitch."""


class ConfigError(KVSwitchError, ValueError):
    """A setting or a layout cannot work. The message names it and says what would."""


class OutOfBlocks(KVSwitchError):  # noqa: N818 - the field's word
    """A pool cannot give the blocks asked for. Preempt a sequence, or ask again later."""


class UnknownSequence(KVSwitchError, KeyError):  # noqa: N818 - the field's word
    """No such sequence (or owner). It was never allocated, or has been freed."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError would print the repr of the message


class InvalidTransition(KVSwitchError):  # noqa: N818 - the field's word
    """What was asked makes no sense in the sequence's present state."""


class HostMemoryExhausted(KVSwitchError):  # noqa: N818 - the field's word
    """The host cannot hold anything of this copy. Recompute, or give kvswitch more host memory."""


class TransferError(KVSwitchError):
    """A transfer failed or was cancelled. The bytes at its destination mean nothing."""


class IntegrityError(KVSwitchError):
    """Internal bookkeeping contradicts itself. A bug: please report it with the message."""
