"""Who asks for what, on which machine: workloads for the simulator (`kvswitch.sim`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from kvswitch.config import StrategyName
from kvswitch.scheduling import PriorityTrace
from kvswitch.sim.cost import LinearSteps
from kvswitch.sim.engine import EngineLimits, SimEngine
from kvswitch.sim.link import Pricing, VirtualLink
from kvswitch.sim.memory import SwitchMemory
from kvswitch.sim.systems import SYSTEMS
from kvswitch.sim.workload import Script, load_lengths

__all__ = ["FEW_LONG", "LIMIT", "MANY_SHORT", "SHAREGPT", "Machine", "Workload", "make_engine"]

LIMIT = 8192
"""Tokens of context that the engine takes; the turn that would exceed them, and later ones, go."""

Turns = list[tuple[int, int]]


@dataclass(frozen=True)
class Machine:
    """What there is, and how fast it is; by default about LLaMA-3-8B on an A10 with 24 GB.

    `slots`, `epoch` and `quantum` are the scheduler's. An iteration takes `base_seconds` (decoding
    is bound by reading the weights) and `prefill_seconds` for each prompt token, of which it takes
    at most `prefill_tokens`. `bandwidth` is in bytes a second and direction.
    """

    device_blocks: int = 2_700
    host_blocks: int = 28_610  # 60 GB
    block_tokens: int = 16
    block_bytes: int = 2 << 20
    slots: int = 256
    epoch: int = 25
    quantum: int = 5
    prefill_tokens: int = 512
    base_seconds: float = 0.030
    prefill_seconds: float = 0.0002
    bandwidth: float = 25e9
    strategy: StrategyName = "adaptive"
    reuse: bool = True
    first_group: int = 60
    headroom: float = 0.06


def make_engine(
    machine: Machine, scripts: list[Script], trace: PriorityTrace
) -> tuple[SimEngine, SwitchMemory]:
    """An engine that serves `scripts` on `machine`, with kvswitch as it is."""
    m = machine
    memory = SwitchMemory(
        replace(SYSTEMS["kvswitch"], strategy=m.strategy, reuse=m.reuse),
        VirtualLink(Pricing(m.bandwidth, m.block_bytes)),
        blocks=m.device_blocks,
        host_blocks=m.host_blocks,
        block_tokens=m.block_tokens,
        headroom=m.headroom,
        first_group=m.first_group,
    )
    limits = EngineLimits(
        blocks=m.device_blocks,
        block_tokens=m.block_tokens,
        slots=m.slots,
        prefill_tokens=m.prefill_tokens,
        epoch=m.epoch,
        quantum=m.quantum,
        headroom=m.headroom,
    )
    steps = LinearSteps(m.base_seconds, m.prefill_seconds)
    return SimEngine(scripts, trace, memory, steps, limits), memory


@dataclass(frozen=True)
class Workload:
    """Conversations and the machine that serves them.

    `turns` makes (prompt, output) tokens a turn of a ShareGPT conversation, empty to leave it out;
    `rate` conversations come a second, and think `think` seconds between turns on average.
    """

    name: str
    turns: Callable[[Turns], Turns]
    rate: float
    think: float
    machine: Machine

    def scripts(self, seed: int, count: int) -> list[Script]:
        """Draw conversations; the same ones for the same seed and count."""
        rng = np.random.default_rng(seed)
        some = [turns for turns in map(self.turns, _lengths()) if turns]
        chosen = rng.choice(len(some), count, replace=len(some) < count)
        arrivals = np.cumsum(rng.exponential(1 / self.rate, count)).tolist()
        return [
            Script(at, some[i], rng.exponential(self.think, len(some[i]) - 1).tolist())
            for at, i in zip(arrivals, chosen.tolist(), strict=True)
        ]


@cache
def _lengths() -> list[Turns]:
    """All conversations up to the limit, prompts of at least 1 and answers of at least 2 tokens."""
    lengths = []
    for conversation in load_lengths():
        turns = [(max(1, prompt), max(2, output)) for prompt, output in conversation]
        total = np.cumsum([prompt + output for prompt, output in turns])
        lengths.append(turns[: int(np.count_nonzero(total <= LIMIT))])
    return lengths


def _first_words(turns: Turns) -> Turns:
    return [(min(prompt, 96), min(output, 64)) for prompt, output in turns[:2]]


def _last_turns(turns: Turns) -> Turns:
    """The last three turns of a long conversation, what was said before in the first prompt."""
    if sum(prompt + output for prompt, output in turns) < LIMIT // 2 or len(turns) < 4:
        return []
    before = sum(prompt + output for prompt, output in turns[:-3])
    (prompt, output), *others = turns[-3:]
    return [(before + prompt, output), *others]


SHAREGPT = Workload("ShareGPT", lambda turns: turns, rate=2.0, think=5.0, machine=Machine())
"""Unclipped conversations, more of them than the machine can serve."""

MANY_SHORT = Workload(
    "many short",
    _first_words,
    rate=40.0,
    think=0.5,
    machine=Machine(
        device_blocks=400, host_blocks=8_000, block_bytes=1 << 20, slots=32, epoch=5, quantum=1
    ),
)
"""Swap-ins take a fraction of an iteration, and there are many: waiting for them pays."""

FEW_LONG = Workload(
    "few long", _last_turns, rate=4.0, think=1.0, machine=Machine(slots=8, epoch=10, quantum=2)
)
"""A swap-in takes about an iteration, in which the others could run: waiting does not pay."""
