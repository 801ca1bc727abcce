"""Serving a workload in one of the modes that the demo compares.

All modes run the same model code, scheduler, priority trace and copy bandwidth:

* *reference*: memory for everybody and no priority changes, so nobody is ever preempted;
* *recompute*: what leaves the device is recomputed, as vLLM and SGLang do;
* *per-block*: swapped by one synchronous copy per block, layer and K or V, without reuse;
* *kvswitch*.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Literal

import torch

from kvswitch import Config, KVSwitch, hookimpl
from kvswitch.config import parse_bytes
from kvswitch.messages import Direction
from kvswitch.scheduling import FixedPolicy, InversionMeter, PriorityPolicy, TracePolicy
from kvswitch.switch import SwapStats
from kvswitch.transfer import Backend, CpuBackend
from kvswitch_demo.engine import Engine, Step
from kvswitch_demo.model import Llama
from kvswitch_demo.per_block import PerBlockBackend, per_layer_layout
from kvswitch_demo.results import IterationRecord, RunResult, Switched, TransferRecord, TurnRecord

if TYPE_CHECKING:
    from kvswitch.transfer import Ticket
    from kvswitch_demo.workload import Conversations, Workload

__all__ = ["MODES", "Mode", "make_engine", "serve"]

Mode = Literal["reference", "recompute", "per-block", "kvswitch"]
MODES: tuple[Mode, ...] = ("reference", "recompute", "per-block", "kvswitch")


@dataclass
class _Watch:
    """A plug-in that only observes: when transfers started and ended."""

    begin: float = 0.0
    transfers: list[TransferRecord] = field(default_factory=list)

    @hookimpl
    def kvswitch_transfer_ended(self, ticket: Ticket) -> None:
        if ticket.error is None:
            self.transfers.append(
                TransferRecord(
                    out=ticket.direction is Direction.OUT,
                    started=ticket.started - self.begin,
                    ended=ticket.ended - self.begin,
                    blocks=ticket.num_blocks,
                    copies=ticket.num_copies,
                    nbytes=ticket.nbytes,
                )
            )


def make_engine(
    model: Llama,
    mode: Mode,
    workload: Workload,
    scripts: Conversations,
    *,
    plugins: Iterable[object],
    never: Iterable[int] = (),
) -> Engine:
    """Build the engine of one mode."""
    settings, priorities = workload.engine, workload.priorities
    bandwidth = parse_bytes(settings.bandwidth, "bandwidth") or None
    blocks = workload.device_blocks(scripts)
    policy: PriorityPolicy = TracePolicy(workload.trace())
    if mode == "reference":
        blocks = sum(-(-s.tokens // settings.block_tokens) + 1 for s in scripts)
        policy = FixedPolicy()
    per_block = mode == "per-block"
    config = Config(
        host_memory=settings.host_memory,
        preemption="recompute" if mode in ("reference", "recompute") else "switch",
        strategy="serial" if per_block else "adaptive",
        reuse=not per_block,
    )
    return Engine(
        model,
        blocks=blocks,
        block_tokens=settings.block_tokens,
        policy=policy,
        slots=settings.slots,
        epoch=priorities.epoch,
        quantum=priorities.quantum,
        prefill_tokens=settings.prefill_tokens,
        config=config,
        kv_layout=per_layer_layout if per_block else None,
        backend=_backend(model.device, bandwidth, per_block=per_block),
        plugins=plugins,
        never=never,
    )


def _backend(device: torch.device, bandwidth: float | None, *, per_block: bool) -> Backend:
    """What copies in a mode. On a GPU the link is the real one."""
    if device.type == "cuda":
        from kvswitch_cuda import CudaBackend

        gpu = device.index or 0
        if per_block:
            return CudaBackend(gpu, copies="loop", pacing="host", coalesce=False)
        return CudaBackend(gpu)
    return PerBlockBackend(bandwidth) if per_block else CpuBackend(bandwidth=bandwidth)


def serve(
    model: Llama,
    mode: Mode,
    workload: Workload,
    scripts: Conversations,
    *,
    never: Iterable[int] = (),
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> tuple[RunResult, list[Switched]]:
    """Serve all conversations.

    Parameters
    ----------
    never : iterable of int
        Tokens that are not to be generated (end of text): answers have the lengths of the workload.
    on_tokens : callable
        Told after each iteration how many tokens it brought.
    """
    watch = _Watch()
    engine = make_engine(model, mode, workload, scripts, plugins=[watch], never=never)
    with engine.switch as switch:
        return _Server(engine, scripts, watch).run(mode, switch, on_tokens)


class _Server:
    """Feeds an engine with turns when they are due, and takes notes."""

    def __init__(self, engine: Engine, scripts: Conversations, watch: _Watch) -> None:
        self._engine = engine
        self._scripts = scripts
        self._watch = watch
        self._due = [(script.arrival, number, 0) for number, script in enumerate(scripts)]
        heapq.heapify(self._due)
        self._open: dict[int, TurnRecord] = {}
        self._turns: list[TurnRecord] = []
        self._iterations: list[IterationRecord] = []
        self._switched: list[Switched] = []
        self._tokens: dict[int, list[int]] = {}
        self._meter = InversionMeter()
        self._recomputed = 0

    def run(
        self, mode: Mode, switch: KVSwitch, on_tokens: Callable[[int], None]
    ) -> tuple[RunResult, list[Switched]]:
        begin = self._watch.begin = perf_counter()
        before = switch.stats()
        end = 0.0
        while self._due or self._engine.busy:
            now = perf_counter() - begin
            self._submit(now)
            if not self._engine.busy:
                switch.step()  # idle conversations' copies go out meanwhile
                sleep(max(0.0, min(0.01, self._due[0][0] - now)))
                continue
            step = self._engine.step()
            stats = switch.stats()
            self._note(step, begin, stats.stall_seconds - before.stall_seconds)
            before, end = stats, step.end - begin
            on_tokens(len(step.tokens))
        return (
            RunResult(
                mode=mode,
                seconds=end,
                turns=self._turns,
                iterations=self._iterations,
                transfers=self._watch.transfers,
                stats=_as_copied(before) if mode == "per-block" else before,
                block_bytes=switch.layout.block_bytes,
                recomputed_tokens=self._recomputed,
                inversion_seconds=self._meter.seconds,
                inversion_request_seconds=self._meter.request_seconds,
                tokens=self._tokens,
            ),
            self._switched,
        )

    def _submit(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            arrival, number, turn = heapq.heappop(self._due)
            script = self._scripts[number]
            record = TurnRecord(number, turn, arrival, len(script.prompts[turn]))
            self._open[number] = record
            self._turns.append(record)
            self._engine.submit(number, script.prompts[turn], script.outputs[turn])

    def _note(self, step: Step, begin: float, stall: float) -> None:
        now = step.end - begin
        for number in step.tokens:
            self._open[number].token_times.append(now)
        for out, numbers in ((True, step.preempted), (False, step.resumed)):
            for number in numbers:
                tokens = len(self._engine.conversations[number].tokens)
                self._switched.append(Switched(number, out, tokens, step.ready - begin))
        for number in step.finished:
            turn, script = self._open.pop(number).turn, self._scripts[number]
            if turn < len(script.pauses):
                heapq.heappush(self._due, (now + script.pauses[turn], number, turn + 1))
            else:
                self._tokens[number] = self._engine.conversations[number].tokens
                self._engine.close_conversation(number)
        self._recomputed += step.recomputed
        self._meter.observe(step.end - step.begin, self._engine.scheduler)
        self._iterations.append(
            IterationRecord(
                begin=step.begin - begin,
                ready=step.ready - begin,
                end=now,
                stall=stall,
                overhead=step.ready - step.begin - stall - step.preparing,
                decoding=len(step.tokens),
                prefilled=step.prefilled,
                recomputed=step.recomputed,
                preempted=len(step.preempted),
                resumed=len(step.resumed),
                epoch=self._engine.scheduler.current_epoch,
            )
        )


def _as_copied(stats: SwapStats) -> SwapStats:
    """Count a copy for every block: that mode does not make use of the planner's runs."""
    return replace(
        stats,
        copies_in=stats.blocks_in,
        copies_out_full=stats.blocks_out_full,
        copies_out_incremental=stats.blocks_out_incremental,
    )
