"""What does not start, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from harness import Server

from kvswitch.errors import ConfigError
from kvswitch_sglang import checks
from kvswitch_sglang.settings import Settings
from scenes.common import TINY


def refused(**arguments: Any) -> dict[str, Any]:
    """Building must fail; with what."""
    try:
        Server(TINY, **arguments)
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "", "message": ""}


def flags(cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is said of each set of SGLang's arguments, as SGLang itself understands them."""
    from sglang.srt.server_args import ServerArgs

    found = {}
    for name, arguments in cases.items():
        args = ServerArgs(model_path=TINY, device="cpu", skip_tokenizer_init=True, **arguments)
        args.resolve_once()
        context = SimpleNamespace(
            server_args=args,
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
            disable_radix_cache=False,
            enable_hierarchical_cache=False,
            model_config=None,
        )
        try:
            checks.check_context(context, Settings())
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    return found


def known() -> dict[str, Any]:
    """The installed SGLang must be as it is expected."""
    checks.check_version()
    checks.check_names()
    return {"kind": ""}


def hooked() -> dict[str, Any]:
    """Another plug-in was first at a method that kvswitch must hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        lambda original, *args, **kwargs: original(*args, **kwargs),
        HookType.AROUND,
    )
    HookRegistry.apply_hooks()
    return refused()
