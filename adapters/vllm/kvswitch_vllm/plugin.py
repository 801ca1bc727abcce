"""vLLM's plug-in entry point: puts ``--kv-offload=kvswitch`` on its command line.

Loaded in every process of vLLM, so it imports nothing heavy, may be called again, and without the
flag changes nothing. The flag is turned into vLLM's own settings while the command line is read, so
that no other process needs to know of it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvswitch.errors import ConfigError
from kvswitch_vllm import checks
from kvswitch_vllm.settings import Settings

__all__ = ["register", "transfer_config"]

_MODULE = "kvswitch_vllm.connector"
_DONE = "_kvswitch_registered"


def transfer_config(settings: Mapping[str, Any] | None = None) -> Any:
    """VLLM's ``KVTransferConfig`` for kvswitch, for ``LLM(kv_transfer_config=...)``.

    Parameters
    ----------
    settings : mapping, optional
        As in ``--kv-offload-config`` (`kvswitch_vllm.settings.Settings`).

    Raises
    ------
    ConfigError
        A setting does not exist, or cannot have that value.
    """
    from vllm.config import KVTransferConfig

    Settings.from_mapping(settings or {})
    return KVTransferConfig(
        kv_connector=checks.CONNECTOR,
        kv_connector_module_path=_MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=dict(settings or {}),
    )


def _is_ours(config: Any) -> bool:
    return config is not None and getattr(config, "kv_connector", None) == checks.CONNECTOR


class _Offload(argparse.Action):
    """Either of the two flags; whichever comes last completes vLLM's own setting."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        if getattr(namespace, "kv_offload", None) != "kvswitch":
            return
        present = getattr(namespace, "kv_transfer_config", None)
        if present is not None and not _is_ours(present):
            parser.error("--kv-offload and --kv-transfer-config exclude each other: give one")
        try:
            settings = getattr(namespace, "kv_offload_config", None)
            namespace.kv_transfer_config = transfer_config(settings)
        except ConfigError as error:
            parser.error(f"--kv-offload-config: {error}")


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('not a JSON object, such as \'{"host_memory": "32GiB"}\'')
    return value


def register() -> None:
    """Teach vLLM the flags and the connector."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore

    if getattr(EngineArgs, _DONE, False):
        return
    setattr(EngineArgs, _DONE, True)
    if checks.CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(checks.CONNECTOR, _MODULE, checks.CONNECTOR)
    _wrap_command_line(EngineArgs)
    _wrap_configuration(EngineArgs)

    def set_request_priority(self: Any, request_id: str, priority: float) -> int:
        change = getattr(self.scheduler, "set_request_priority", None)
        return 0 if change is None else int(change(request_id, priority))

    # The engine core's utility calls look methods up by name.
    EngineCore.set_request_priority = set_request_priority


def _wrap_command_line(engine_args: Any) -> None:
    add_cli_args = engine_args.add_cli_args

    @functools.wraps(add_cli_args)
    def add(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            "KVSwitch", "Preemption as a cheap context switch: the KV cache goes to host memory."
        )
        group.add_argument(
            "--kv-offload",
            choices=["none", "kvswitch"],
            default="none",
            action=_Offload,
            help="Keep the KV cache of preempted and finished requests in host memory, and switch "
            "between requests by priority.",
        )
        group.add_argument(
            "--kv-offload-config",
            type=_mapping,
            default=None,
            action=_Offload,
            metavar="JSON",
            help='Settings of kvswitch, such as \'{"host_memory": "32GiB"}\'. There are: '
            + ", ".join(Settings.__struct_fields__),
        )
        return parser

    engine_args.add_cli_args = staticmethod(add)
    from_cli_args = engine_args.from_cli_args.__func__

    @functools.wraps(from_cli_args)
    def from_args(cls: Any, args: argparse.Namespace) -> Any:
        wanted = getattr(args, "kv_offload", "none") == "kvswitch"
        if wanted and not _is_ours(getattr(args, "kv_transfer_config", None)):
            raise ConfigError(
                "--kv-offload and --kv-transfer-config exclude each other: give one of them"
            )
        if not wanted and getattr(args, "kv_offload_config", None) is not None:
            raise ConfigError("--kv-offload-config has no effect without --kv-offload=kvswitch")
        return from_cli_args(cls, args)

    engine_args.from_cli_args = classmethod(from_args)


def _wrap_configuration(engine_args: Any) -> None:
    create = engine_args.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self.kv_transfer_config):
            return create(self, *args, **kwargs)
        transfer = self.kv_transfer_config
        if getattr(self, "kv_offloading_size", None):
            raise ConfigError(
                "kvswitch does not work with --kv-offloading-size (vLLM's own offloading): "
                "leave one of the two out"
            )
        # A failed load costs that request's recomputation, not the request.
        transfer.kv_load_failure_policy = "recompute"
        if self.scheduler_cls is None:
            self.scheduler_cls = checks.SCHEDULER
            self.scheduling_policy = "priority"  # first come, first served among equals
            if getattr(self, "watermark", None) == 0:
                settings = Settings.from_mapping(transfer.kv_connector_extra_config or {})
                self.watermark = settings.headroom
        elif self.scheduler_cls != checks.SCHEDULER:
            from vllm.logger import init_logger

            init_logger("vllm.kvswitch").warning(
                "kvswitch: --scheduler-cls names another scheduler than kvswitch's, so it is a "
                "connector only: no waiting request preempts a running one, and priorities do not "
                "change at run time"
            )
        config = create(self, *args, **kwargs)
        checks.check_config(config)
        return config

    engine_args.create_engine_config = create_engine_config
