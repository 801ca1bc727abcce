"""Which simulations the figures need, at full size and for a quick look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from kvswitch.sim.evaluation.jobs import Job
from kvswitch.sim.run import Pattern
from kvswitch.sim.workload import Reading

__all__ = [
    "BASELINE",
    "COMPARED",
    "FULL",
    "OURS",
    "PATTERNS",
    "QUICK",
    "READINGS",
    "SETTINGS",
    "STAGES",
    "Plan",
    "Scale",
    "Variant",
]

BASELINE, OURS = "vllm-swap", "kvswitch"
STAGES = ("vllm-swap", "groups", "manager", "fastswitch", "kvswitch")
COMPARED = (
    "vllm-swap-joint",
    "vllm-swap-prefill",
    "groups",
    "inline",
    "manager",
    "fastswitch",
    "vllm-v1",
    "vllm-v1-offload",
    "vllm-v1-offload-all",
)
PATTERNS: tuple[Pattern, ...] = ("markov", "random")
READINGS: tuple[Reading, ...] = ("turns", "conversations")
SETTINGS = {"llama": ("a10", "llama-8b", 25), "qwen": ("a100", "qwen-32b", 50)}
"""GPU, model, and iterations between priority updates [5.1]."""


@dataclass(frozen=True)
class Scale:
    """How much is simulated.

    Attributes
    ----------
    seeds : int
        For figure 8 a to d; everything else has one.
    conversations, fewer : int
        Of figures 1, 2 and 8 a to d, and of sweeps.
    epochs : tuple of int
        Iterations between priority updates in sweeps: seven with a median of 50, as in section 3.1.
    groups : tuple of int
        Blocks of the first group (figure 11: 64 to 3,000 tokens).
    memory : tuple of float
        GB on the host (figure 13).
    rates : tuple of float
        Turns a second.
    variants : int or None
        How many uncertain constants are varied; None: all.
    """

    name: str
    seeds: int
    conversations: int
    fewer: int
    epochs: tuple[int, ...]
    groups: tuple[int, ...]
    memory: tuple[float, ...]
    rates: tuple[float, ...]
    variants: int | None = None


FULL = Scale(
    "full",
    seeds=5,
    conversations=1000,
    fewer=300,
    epochs=(200, 100, 75, 50, 25, 20, 10),
    groups=(4, 16, 60, 125, 188),
    memory=(5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0),
    rates=(0.5, 1.0, 2.0, 3.0, 4.0, 8.0),
)
QUICK = Scale(
    "quick",
    seeds=1,
    conversations=60,
    fewer=50,
    epochs=(100, 50, 25),
    groups=(4, 60, 188),
    memory=(5.0, 20.0, 60.0),
    rates=(1.0, 4.0),
    variants=2,
)


@dataclass(frozen=True)
class Variant:
    """An uncertain constant, with another value."""

    label: str
    changes: tuple[tuple[str, object], ...]
    only: str | None = None  # the system it makes a difference to

    def of(self, job: Job) -> Job:
        """Apply it to a job."""
        if self.only not in (None, job.system):
            return job
        return msgspec.structs.replace(job, **dict(self.changes))


def _engine(label: str, **constants: float) -> Variant:
    return Variant(label, (("engine", tuple(constants.items())),))


def _link(label: str, **constants: float) -> Variant:
    return Variant(label, (("link", tuple(constants.items())),))


def _ours(label: str, **constants: float) -> Variant:
    return Variant(label, (("link", tuple(constants.items())),), only=OURS)


VARIANTS = (
    _link("dispatch 2.3 us a copy (10)", loop_dispatch=2.3),
    Variant("think 0 s (10)", (("think", 0.0),)),
    _link("dispatch 5 us a copy (10)", loop_dispatch=5.0),
    _link("dispatch 15 us a copy (10)", loop_dispatch=15.0),
    _link("link 20 GB/s (25)", bandwidth=20.0),
    _ours("kvswitch: dispatch 2 us a copy (0.65)", batch_dispatch=2.0),
    _ours("kvswitch: a copy costs 4.8 us beside its bytes (0.13)", batch_copy=4.8),
    _ours("kvswitch: 50 us between windows (10)", window_gap=50.0),
    _engine("memory bandwidth used 60% (75)", bandwidth_utilisation=0.6),
    _engine("memory bandwidth used 85% (75)", bandwidth_utilisation=0.85),
    _engine("FLOPS used 40% (60)", flops_utilisation=0.4),
    _engine("FLOPS used 72% (60)", flops_utilisation=0.72),
    _engine("step overhead 0 ms (2)", step_overhead=0.0),
    _engine("step overhead 5 ms (2)", step_overhead=5.0),
    _engine("activations 2 GiB (1)", activations=2.0),
    _engine("prefill 2,048 tokens a step (512)", prefill_tokens=2048),
    Variant("think 60 s (10)", (("think", 60.0),)),
    Variant("Markov keeps 50% (90)", (("keep", 0.5),)),
    Variant("Markov keeps 98% (90)", (("keep", 0.98),)),
    Variant("updates every 1.0 s (25 iterations)", (("seconds", 1.0),)),
    Variant("kvswitch: headroom 2% (6)", (("headroom", 0.02),), only=OURS),
    Variant("kvswitch: headroom 0 (6)", (("headroom", 0.0),), only=OURS),
    Variant("baseline: K and V in one copy", (("system", "vllm-swap-joint"),), only=BASELINE),
    Variant("baseline: next turn by prefill", (("system", "vllm-swap-prefill"),), only=BASELINE),
)


class Plan:
    """The jobs of each figure, at a scale."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def latency(
        self, model: str, pattern: Pattern, reading: Reading, system: str, seed: int = 0
    ) -> Job:
        """One of figure 8 a to d."""
        gpu, name, epoch = SETTINGS[model]
        return Job(
            system=system,
            gpu=gpu,
            model=name,
            epoch=epoch,
            pattern=pattern,
            reading=reading,
            conversations=self.scale.conversations,
            seed=seed,
        )

    def sweep(
        self,
        system: str,
        *,
        model: str = "llama",
        pattern: Pattern = "markov",
        reading: Reading = "conversations",
        epoch: int = 25,
        **changes: object,
    ) -> Job:
        """One of a sweep: fewer conversations."""
        gpu, name, _ = SETTINGS[model]
        fields = {"conversations": self.scale.fewer, **changes}
        return Job(
            system=system,
            gpu=gpu,
            model=name,
            epoch=epoch,
            pattern=pattern,
            reading=reading,
            **fields,  # type: ignore[arg-type]
        )

    def motivation(self, system: str, epoch: int, conversations: int, reading: Reading) -> Job:
        """Figures 1 and 2."""
        count = min(conversations, self.scale.conversations)
        return Job(system=system, epoch=epoch, conversations=count, reading=reading)

    def load(self, system: str, rate: float) -> Job:
        """Latency against the load."""
        return self.sweep(system, reading="turns", rate=rate)

    def variants(self) -> tuple[Variant, ...]:
        """Uncertain constants that are varied."""
        return VARIANTS[: self.scale.variants]

    def jobs(self) -> Iterator[Job]:
        """All jobs, the most telling first."""
        scale = self.scale
        for reading in READINGS:
            yield self.motivation(BASELINE, 100, 1000, reading)
            yield self.motivation("manager", 50, 500, reading)
        for model in SETTINGS:
            for pattern in PATTERNS:
                for seed in range(scale.seeds):
                    for system in (BASELINE, OURS):
                        yield self.latency(model, pattern, "turns", system, seed)
        for epoch in scale.epochs:
            for system in STAGES:
                yield self.sweep(system, epoch=epoch)
        for rate in scale.rates:
            for system in (BASELINE, "vllm-v1", OURS):
                yield self.load(system, rate)
        for blocks in scale.groups:
            for epoch in scale.epochs[1::2]:
                yield self.sweep("fastswitch", epoch=epoch, first_group=blocks)
        for memory in scale.memory:
            yield self.sweep("fastswitch", host_memory=memory)
            yield self.sweep(OURS, host_memory=memory)
        for model in SETTINGS:
            for pattern in PATTERNS:
                for epoch in scale.epochs[1::2]:
                    for system in (BASELINE, OURS):
                        yield self.sweep(system, model=model, pattern=pattern, epoch=epoch)
        for reading in READINGS:
            for system in (BASELINE, OURS):
                job = self.sweep(system, reading=reading)
                yield job
                for variant in self.variants():
                    yield variant.of(job)
        for model in SETTINGS:
            for pattern in PATTERNS:
                for system in (BASELINE, OURS):
                    yield self.latency(model, pattern, "conversations", system)
        for reading in READINGS:
            for model in SETTINGS:
                for system in COMPARED:
                    yield self.latency(model, "markov", reading, system)
        for seed in range(1, scale.seeds):
            for model in SETTINGS:
                for pattern in PATTERNS:
                    for system in (BASELINE, OURS):
                        yield self.latency(model, pattern, "conversations", system, seed)
