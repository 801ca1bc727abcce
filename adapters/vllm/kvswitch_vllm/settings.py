"""Settings of kvswitch in vLLM: those of the core, and who runs next."""

from __future__ import annotations

from typing import Any

import msgspec

from kvswitch.config import Config
from kvswitch.errors import ConfigError

__all__ = ["Settings"]


class Settings(Config, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``--kv-offload-config`` may say, beside what `Config` has.

    Attributes
    ----------
    policy : str
        How priorities change over time: "fixed" (a request keeps its own; ageing with
        ``{"ageing": epochs}``), "random", "markov", "trace", or the name of a registered one.
    policy_settings : mapping
        That policy's own settings.
    epoch : int
        Iterations between two priority updates.
    quantum : int
        Iterations for which a request just switched in is not preempted for another.
    """

    policy: str = "fixed"
    policy_settings: dict[str, Any] = msgspec.field(default_factory=dict)
    epoch: int = 25
    quantum: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch < 1:
            raise ConfigError(f"epoch={self.epoch}: give 1 iteration or more")
        if not 0 <= self.quantum < self.epoch:
            raise ConfigError(
                f"quantum={self.quantum} must be 0 or more and below epoch={self.epoch}: a request "
                "must be able to give way before the next priority update"
            )
