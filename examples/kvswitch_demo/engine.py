"""A small continuous-batching engine whose KV memory is managed by kvswitch.

This is the guide to calling kvswitch from an engine of your own. Everything that kvswitch needs to
know happens in one iteration, `Engine.step`, in this order:

1. *Decide*: the scheduler says who leaves, who comes back and who starts. `preempt` and `resume`
   return at once, nothing has moved yet.
2. *Grow*: `allocate` makes sure that everybody in the batch has blocks for the tokens to come. If
   there are none left, somebody of low priority gives way.
3. *Switch*: `dispatch` starts the copies and says who will not be here in time. While they are
   under way the batch is prepared; `wait` blocks for what the forward needs, and says who landed.
4. *Forward*: run the model on everybody who is here. Other copies go on meanwhile.
5. *Finish*: the end of a turn is a context switch too. The conversation stays on the device until
   somebody needs the room, and its next turn finds its KV cache again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch

from kvswitch import Config, HostMemoryExhausted, KVSwitch, OutOfBlocks
from kvswitch.messages import BlockIds
from kvswitch.scheduling import PriorityPolicy, PriorityScheduler
from kvswitch.transfer import Backend
from kvswitch_demo.model import Chunk, Llama

__all__ = ["Conversation", "Engine", "Step"]


@dataclass(eq=False)
class Conversation:
    """A conversation over many turns.

    Attributes
    ----------
    id : int
        Also its number in the priority trace.
    tokens : list of int
        All its tokens, prompts and answers.
    computed : int
        Leading tokens whose KV is, or will be when it has landed, on the device.
    stop : int
        ``len(tokens)`` at which the present turn's answer is complete.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    stop: int = 0
    started: bool = False
    blocks: int = 0
    furthest: int = 0  # most tokens ever computed: what is computed below it is computed again


@dataclass
class Step:
    """What one iteration did; times by `perf_counter`.

    `preparing` is how long it took to prepare the batch: part of the forward, but before `ready`.
    """

    begin: float
    preparing: float = 0.0
    ready: float = 0.0
    end: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)  # by conversation
    finished: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    prefilled: int = 0
    recomputed: int = 0


class _Share(NamedTuple):
    """A sequence's part in a batch: how many tokens to compute, and its block table."""

    tokens: int
    blocks: BlockIds


class Engine:
    """Serves conversations turn by turn, greedily decoded.

    Parameters
    ----------
    model : Llama
    blocks : int
        Blocks of device KV memory.
    block_tokens : int
        Tokens in a block.
    policy : PriorityPolicy
    slots : int
        Largest number of running sequences.
    epoch, quantum : int
        Iterations between priority updates, and that a sequence is left alone once switched in.
    prefill_tokens : int
        Prompt tokens processed in one iteration, at most (chunked prefill).
    config : Config
    kv_layout : callable, optional
        Turns the KV tensor into what `KVSwitch` is given, if not the tensor itself.
    backend, plugins
        See `KVSwitch`.
    never : iterable of int
        Tokens that are not to be generated, such as the end of text: answers have fixed lengths.
    """

    def __init__(
        self,
        model: Llama,
        *,
        blocks: int,
        block_tokens: int,
        policy: PriorityPolicy,
        slots: int,
        epoch: int,
        quantum: int,
        prefill_tokens: int,
        config: Config,
        kv_layout: Any = None,
        backend: Backend | None = None,
        plugins: Iterable[object] = (),
        never: Iterable[int] = (),
    ) -> None:
        self.model = model
        self.kv_cache = model.new_cache(blocks, block_tokens)
        self.switch = KVSwitch(
            self.kv_cache if kv_layout is None else kv_layout(self.kv_cache),
            config,
            block_tokens=block_tokens,
            backend=backend,
            plugins=plugins,
        )
        self.scheduler = PriorityScheduler(
            policy,
            blocks=blocks,
            slots=slots,
            epoch=epoch,
            quantum=quantum,
            headroom=int(config.headroom * blocks),
        )
        self.prefill_tokens = prefill_tokens
        self.conversations: dict[Hashable, Conversation] = {}
        self._running: dict[Hashable, Conversation] = {}
        self._block_tokens = block_tokens
        self._epoch = -1
        self._never = torch.tensor(list(never), dtype=torch.long, device=model.device)

    @property
    def busy(self) -> bool:
        """Whether any turn is unfinished."""
        return len(self.scheduler) > 0

    def submit(self, conversation: int, prompt: list[int], output_tokens: int) -> None:
        """Begin a turn: the conversation's first, or the next one."""
        c = self.conversations.setdefault(conversation, Conversation(conversation))
        c.tokens += prompt
        c.stop = len(c.tokens) + output_tokens
        need = -(-len(c.tokens) // self._block_tokens)
        self.scheduler.add(c.id, need=need, index=c.id, swapped=c.started)

    def close_conversation(self, conversation: int) -> None:
        """No turn will follow: its blocks and copies go."""
        self.switch.free(conversation)
        del self.conversations[conversation]

    # -- one iteration -------------------------------------------------------------------------

    def step(self) -> Step:
        """Run one iteration."""
        step = Step(perf_counter())
        # 1. Decide.
        free = self.switch.available_blocks(headroom=False, returning=True)
        decision = self.scheduler.schedule(free)
        if self.scheduler.current_epoch != self._epoch:
            self._tell_priorities()
        for id_ in decision.preempt:
            self._preempt(self.conversations[id_], step)
        for id_ in (*decision.resume, *decision.admit):
            self._switch_in(self.conversations[id_], step)
        # 2. Grow.
        batch = self._plan_batch(step)
        # 3. Switch.
        absent = self.switch.dispatch()
        work = {c: share for c, share in batch.items() if c.id not in absent}
        started = perf_counter()
        forward = self._prepare(work)
        step.preparing = perf_counter() - started
        for id_, tokens in self.switch.wait().landed.items():
            if tokens != self.conversations[id_].computed:
                self.conversations[id_].computed = tokens  # a copy failed: recompute the rest
                forward = self._prepare(work)
        step.ready = perf_counter()
        # 4. Forward.
        if forward is not None:
            self._take_tokens(work, forward(), step)
        step.end = perf_counter()
        return step

    def _preempt(self, c: Conversation, step: Step) -> None:
        try:
            self.switch.preempt(c.id, c.computed)
        except HostMemoryExhausted:
            self.switch.discard(c.id, c.computed)  # to be recomputed
        del self._running[c.id]
        step.preempted.append(c.id)

    def _switch_in(self, c: Conversation, step: Step) -> None:
        try:
            if c.started:
                c.computed = self.switch.resume(c.id, c.computed).tokens
                step.resumed.append(c.id)
            else:
                self.switch.allocate(c.id, len(c.tokens), expected=c.stop)
                c.started = True
        except OutOfBlocks:
            self.scheduler.deferred(c.id)  # it will be tried again in the next iteration
        else:
            self._running[c.id] = c

    def _plan_batch(self, step: Step) -> dict[Conversation, _Share]:
        """Who computes how many tokens: one each that decodes, the rest of the budget prefills."""
        batch: dict[Conversation, _Share] = {}
        budget = self.prefill_tokens
        for c in list(self._running.values()):
            if c.id not in self._running:
                continue  # it gave way to one before it
            blocks = self._grow(c, batch, step)
            missing = len(c.tokens) - c.computed
            tokens = missing if missing == 1 else min(missing, budget)
            if blocks is not None and tokens:
                batch[c] = _Share(tokens, blocks)
                budget -= tokens if missing > 1 else 0
        return batch

    def _grow(
        self, c: Conversation, batch: dict[Conversation, _Share], step: Step
    ) -> BlockIds | None:
        """Get blocks for all of `c`'s tokens; None if it cannot run now."""
        while True:
            try:
                blocks = self.switch.allocate(c.id, len(c.tokens), expected=c.stop)
            except OutOfBlocks:
                # Somebody of low priority gives way; not one whose swap-in is still under way,
                # since that frees no blocks at once.
                name = self.scheduler.victim(exclude=self.switch.arriving)
                if name is None:
                    return None
                victim = self.conversations[name]
                self._preempt(victim, step)
                self.scheduler.yielded(name)
                batch.pop(victim, None)
                if victim is c:
                    return None
            else:
                if len(blocks) != c.blocks:
                    c.blocks = len(blocks)
                    self.scheduler.update(c.id, held=c.blocks)
                return blocks

    def _prepare(self, work: dict[Conversation, _Share]) -> Callable[[], torch.Tensor] | None:
        """The forward of a batch, ready to be called; None if there is nothing to do."""
        chunks = [
            Chunk(c.tokens[c.computed : c.computed + share.tokens], c.computed, share.blocks)
            for c, share in work.items()
        ]
        return self.model.prepare(chunks, self.kv_cache) if chunks else None

    def _take_tokens(
        self, work: dict[Conversation, _Share], logits: torch.Tensor, step: Step
    ) -> None:
        logits = logits.index_fill(1, self._never, -torch.inf)
        for (c, share), token in zip(work.items(), logits.argmax(-1).tolist(), strict=True):
            done = c.computed + share.tokens
            step.recomputed += max(0, min(c.furthest, done) - c.computed)
            step.prefilled += share.tokens if share.tokens > 1 else 0
            c.computed, c.furthest = done, max(c.furthest, done)
            if done < len(c.tokens):
                continue  # its prompt is not through yet
            c.tokens.append(token)
            step.tokens[c.id] = token
            if len(c.tokens) == c.stop:
                self._finish(c, step)

    def _finish(self, c: Conversation, step: Step) -> None:
        self.switch.end_turn(c.id, c.computed)
        self.scheduler.remove(c.id)
        del self._running[c.id]
        step.finished.append(c.id)

    def _tell_priorities(self) -> None:
        """At a priority epoch: who loses host copies first is decided by priority, too."""
        self._epoch = self.scheduler.current_epoch
        for c in self.conversations.values():
            if c.started and c.id in self.scheduler:
                self.switch.set_priority(c.id, self.scheduler.priority(c.id))
