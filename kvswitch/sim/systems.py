"""The systems that are compared, as settings of one simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvswitch.config import StrategyName
from kvswitch.errors import ConfigError

__all__ = ["SYSTEMS", "System", "find_system"]


@dataclass(frozen=True)
class System:
    """How a system manages KV cache that does not fit.

    Attributes
    ----------
    name, title : str
    memory : {"switch", "prefix cache"}
        Driven by kvswitch's planner, or a model of vLLM V1's prefix cache.
    next_turn : {"keep", "swap", "drop"}
        What the end of a turn does: keep it on the device until somebody needs the room, swap it
        out at once, or drop it: then the next turn computes all of it again.
    strategy, reuse, swap
        The planner's.
    groups : bool
        Whether neighbouring blocks are one copy, or a copy is made for each.
    pieces : {"kv", "layer", "block"}
        What a copy carries of a run of blocks: K or V of a layer, both, or all layers.
    batch : bool
        Copies are dispatched with a driver call for many, not one for each.
    dispatcher : {"engine", "workers"}
        Who dispatches. In a serial system the engine waits for everything anyway.
    headroom : float or None
        Share of device blocks left free; None: the engine profile's.
    offload : {"none", "prompts", "all"}
        What a prefix cache copies to the host as soon as it is computed.
    """

    name: str
    title: str
    memory: Literal["switch", "prefix cache"] = "switch"
    next_turn: Literal["keep", "swap", "drop"] = "swap"
    strategy: StrategyName = "serial"
    reuse: bool = False
    swap: bool = True
    groups: bool = True
    pieces: Literal["kv", "layer", "block"] = "kv"
    batch: bool = False
    dispatcher: Literal["engine", "workers"] = "workers"
    headroom: float | None = None
    offload: Literal["none", "prompts", "all"] = "none"

    @property
    def serial(self) -> bool:
        """Whether swapping and inference go on one after the other."""
        return self.strategy == "serial"


SYSTEMS = {
    system.name: system
    for system in (
        # vLLM before V1, the paper's baseline: kv_cache[0] and kv_cache[1] of every layer, a
        # cudaMemcpyAsync for each block (csrc/cache_kernels.cu, swap_blocks), watermark 0.01.
        System("vllm-swap", "vLLM, swapping", groups=False, headroom=0.01),
        System(
            "vllm-swap-joint",
            "vLLM, swapping, K and V in one copy",
            groups=False,
            headroom=0.01,
            pieces="layer",
        ),
        System(
            "vllm-swap-prefill",
            "vLLM, swapping, next turn by prefill",
            groups=False,
            headroom=0.01,
            next_turn="drop",
        ),
        # FastSwitch by its stages [5.3].
        System("groups", "+ block groups"),
        System(
            "inline",
            "+ asynchronous copies, dispatched inline",
            strategy="adaptive",
            dispatcher="engine",
        ),
        System("manager", "+ swap manager", strategy="adaptive"),
        System("fastswitch", "+ reuse (FastSwitch)", strategy="adaptive", reuse=True),
        # What this project does.
        System(
            "kvswitch",
            "kvswitch",
            strategy="adaptive",
            reuse=True,
            next_turn="keep",
            batch=True,
        ),
        # What users have today.
        System("vllm-v1", "vLLM V1, recompute", memory="prefix cache", headroom=0.0),
        System(
            "vllm-v1-offload",
            "vLLM V1, prompts offloaded",
            memory="prefix cache",
            headroom=0.0,
            batch=True,
            groups=False,
            strategy="async",
            offload="prompts",
        ),
        System(
            "vllm-v1-offload-all",
            "vLLM V1, everything offloaded",
            memory="prefix cache",
            headroom=0.0,
            batch=True,
            groups=False,
            strategy="async",
            offload="all",
        ),
    )
}
"""By name."""


def find_system(name: str) -> System:
    """Look up a system; ConfigError names those there are."""
    try:
        return SYSTEMS[name]
    except KeyError:
        raise ConfigError(f"no system {name!r}; there are: {', '.join(SYSTEMS)}") from None
