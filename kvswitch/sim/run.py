"""One simulation: a system serves a workload on a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from time import perf_counter
from typing import Literal, TypeAlias

from kvswitch.errors import ConfigError
from kvswitch.scheduling import PriorityTrace
from kvswitch.sim.cost import RooflineSteps, StepModel
from kvswitch.sim.engine import EngineLimits, SimEngine
from kvswitch.sim.link import Pricing, VirtualLink
from kvswitch.sim.memory import SwitchMemory
from kvswitch.sim.metrics import Result
from kvswitch.sim.prefix_cache import PrefixCacheMemory
from kvswitch.sim.profiles import Engine, Gpu, Link, Model, Profiles, load_profiles
from kvswitch.sim.systems import System
from kvswitch.sim.workload import Script

__all__ = ["Machine", "Pattern", "Priorities", "make_engine", "simulate"]

Pattern: TypeAlias = Literal["random", "markov"]

_EPOCHS = 4096  # length of a priority trace; it starts anew at its end


@dataclass(frozen=True)
class Priorities:
    """How priorities change.

    Attributes
    ----------
    pattern : {"random", "markov"}
    epoch : int
        Iterations between two updates; the paper's frequency is 1 / epoch.
    seconds : float or None
        Update by the clock in place of iterations.
    levels, keep
        See `PriorityTrace`.
    """

    pattern: Pattern = "markov"
    epoch: int = 25
    seconds: float | None = None
    levels: int = 8
    keep: float = 0.9

    def __post_init__(self) -> None:
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError(f"seconds between updates must be more than 0, got {self.seconds}")

    def trace(self, seed: int, sequences: int) -> PriorityTrace:
        """Make the trace that all systems share."""
        if self.pattern == "markov":
            return PriorityTrace.markov(seed, sequences, _EPOCHS, self.levels, keep=self.keep)
        return PriorityTrace.random(seed, sequences, _EPOCHS, self.levels)


@dataclass(frozen=True)
class Machine:
    """A GPU with a model on it, and memory on the host.

    Attributes
    ----------
    host_memory : float
        GB for copies.
    first_group : int
        Expected size of a sequence's first block group, in blocks.
    """

    gpu: Gpu
    model: Model
    link: Link
    engine: Engine
    host_memory: float = 60.0
    first_group: int = 60

    @classmethod
    def of(cls, gpu: str, model: str, profiles: Profiles | None = None) -> Machine:
        """Put together what the profiles say; ConfigError for an unknown name."""
        profiles = profiles or load_profiles()
        card = profiles.find_gpu(gpu)
        return cls(
            card,
            profiles.find_model(model),
            profiles.link_of(card),
            profiles.engine,
            profiles.setting.host_memory,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of a block over all layers."""
        return self.model.kv_bytes * self.engine.block_tokens

    @property
    def device_blocks(self) -> int:
        """Blocks of KV cache on the device; ConfigError if the model does not fit."""
        return self.engine.device_blocks(self.gpu, self.model)

    @property
    def host_blocks(self) -> int:
        """Blocks of copies on the host."""
        blocks = int(self.host_memory * 1e9 // self.block_bytes)
        if blocks < 1:
            raise ConfigError(
                f"host memory of {self.host_memory} GB does not hold a block of "
                f"{self.block_bytes / 1e6:.1f} MB"
            )
        return blocks

    def pricing(self, system: System) -> Pricing:
        """What transfers of a system cost on this machine's link."""
        dispatch, copy = self.link.copy_seconds(batch=system.batch)
        per_layer = {"kv": 2 * self.model.layers, "layer": self.model.layers, "block": 1}
        return Pricing(
            bandwidth=self.link.bytes_per_second,
            block_bytes=self.block_bytes,
            pieces=per_layer[system.pieces],
            dispatch=dispatch,
            copy=copy,
            merge=system.groups,
            window=0.0 if system.serial else self.engine.window_bytes,
            gap=self.link.window_gap * 1e-6,
        )

    def steps(self) -> StepModel:
        """How long iterations take."""
        return RooflineSteps(self.gpu, self.model, self.engine)


@lru_cache(maxsize=4)
def _trace(priorities: Priorities, seed: int, sequences: int) -> PriorityTrace:
    return priorities.trace(seed, sequences)


def make_engine(
    system: System,
    scripts: list[Script],
    machine: Machine,
    priorities: Priorities,
    *,
    seed: int = 0,
    steps: StepModel | None = None,
) -> tuple[SimEngine, SwitchMemory | PrefixCacheMemory]:
    """Put an engine and its memory together; see `simulate`."""
    blocks = machine.device_blocks
    headroom = machine.engine.headroom if system.headroom is None else system.headroom
    link = VirtualLink(machine.pricing(system), duplex=not system.serial)
    tokens = machine.engine.block_tokens
    memory: SwitchMemory | PrefixCacheMemory
    if system.memory == "switch":
        memory = SwitchMemory(
            system,
            link,
            blocks=blocks,
            host_blocks=machine.host_blocks,
            block_tokens=tokens,
            headroom=headroom,
            first_group=machine.first_group,
        )
    else:
        memory = PrefixCacheMemory(
            system, link, blocks=blocks, host_blocks=machine.host_blocks, block_tokens=tokens
        )
    limits = EngineLimits(
        blocks=blocks,
        block_tokens=tokens,
        slots=machine.engine.slots,
        prefill_tokens=machine.engine.prefill_tokens,
        epoch=priorities.epoch,
        quantum=machine.engine.quantum,
        headroom=headroom,
        epoch_seconds=priorities.seconds,
    )
    engine = SimEngine(
        scripts,
        _trace(priorities, seed, len(scripts)),
        memory,
        steps or machine.steps(),
        limits,
        window_bytes=0.0 if system.serial else machine.engine.window_bytes,
    )
    return engine, memory


def simulate(
    system: System,
    scripts: list[Script],
    machine: Machine,
    priorities: Priorities,
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Serve all conversations.

    Parameters
    ----------
    system : System
    scripts : list of Script
    machine : Machine
    priorities : Priorities
    seed : int
        Of the priority trace: the same for all systems that are to be compared.
    on_progress : callable, optional
        Told now and then how many turns have been served.

    Raises
    ------
    ConfigError
        Something cannot work: the model or a conversation does not fit.
    """
    begin = perf_counter()
    engine, memory = make_engine(system, scripts, machine, priorities, seed=seed)
    engine.serve(on_progress=on_progress)
    swaps = asdict(memory.stats)
    if not system.groups:
        for direction in ("in", "out_full", "out_incremental"):
            swaps[f"copies_{direction}"] = swaps[f"blocks_{direction}"]
    engine.close()
    return engine.recorder.result(
        makespan=engine.now,
        blocks=machine.device_blocks,
        inversion=(engine.inversion.seconds, engine.inversion.request_seconds),
        overhead=engine.overhead + memory.overhead,
        link_seconds={d.name.lower(): s for d, s in memory.link.seconds.items()},
        swaps=swaps,
        real_seconds=perf_counter() - begin,
    )
