"""A continuous-batching engine in virtual time, over real decisions.

One iteration, in the order of the engine in examples/: decide, grow, switch, forward. What is
simulated is only how long forwards and copies take. Sequences that decode all advance by one token
a forward, so nothing is done for them until something happens to one: it needs another block, its
turn ends, or it is switched out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import process_time

from kvswitch.errors import ConfigError, OutOfBlocks
from kvswitch.messages import Direction
from kvswitch.scheduling import FixedPolicy, InversionMeter, PriorityScheduler, TracePolicy
from kvswitch.scheduling.trace import PriorityTrace
from kvswitch.sim.cost import StepModel
from kvswitch.sim.link import NEVER
from kvswitch.sim.memory import Memory
from kvswitch.sim.metrics import Recorder
from kvswitch.sim.workload import Script

__all__ = ["EngineLimits", "SimEngine"]


@dataclass(frozen=True)
class EngineLimits:
    """What the scheduler and the batch are bounded by.

    Attributes
    ----------
    blocks, block_tokens : int
        Device blocks, and tokens in each.
    slots, prefill_tokens, quantum
        See `kvswitch.sim.profiles.Engine`.
    epoch : int
        Iterations between priority updates.
    epoch_seconds : float or None
        Seconds between priority updates, in place of iterations.
    headroom : float
        Share of device blocks left free.
    """

    blocks: int
    block_tokens: int
    slots: int
    prefill_tokens: int
    epoch: int
    quantum: int
    headroom: float
    epoch_seconds: float | None = None


@dataclass(eq=False, slots=True)
class _Conversation:
    """A conversation; `length`, with the prompt of the present turn, is out of date while decoding.

    Attributes
    ----------
    furthest : int
        Most tokens ever computed: what is computed below it is computed again.
    stop : int
        Length at which the turn is over.
    since, base : int
        Decoding: the forward at which it began to, and its length then.
    entry : int
        Grows whenever it begins to decode, so that what was foreseen for an earlier time is void.
    fresh : bool
        Decoding, but has had no forward yet: its next gap is not that of the others.
    asked : float or None
        When its turn came, until the first token.
    last_token : float
        When its last token came, while it is not decoding.
    """

    id: int
    script: Script
    turn: int = 0
    length: int = 0
    computed: int = 0
    furthest: int = 0
    stop: int = 0
    started: bool = False
    priority: float = 0.0
    decoding: bool = False
    since: int = 0
    base: int = 0
    entry: int = 0
    fresh: bool = False
    asked: float | None = None
    last_token: float = 0.0


class SimEngine:
    """Serves scripts, the i-th as sequence i with number i in the priority trace.

    Parameters
    ----------
    scripts : list of Script
    trace : PriorityTrace
    memory : Memory
    steps : StepModel
    limits : EngineLimits
    window_bytes : float
        Bytes that the engine's own copies may have to wait for while a swap is under way.

    Raises
    ------
    ConfigError
        A conversation does not fit on the device.
    """

    def __init__(
        self,
        scripts: list[Script],
        trace: PriorityTrace,
        memory: Memory,
        steps: StepModel,
        limits: EngineLimits,
        *,
        window_bytes: float = 0.0,
    ) -> None:
        longest = max((script.tokens for script in scripts), default=0)
        if -(-longest // limits.block_tokens) > limits.blocks:
            raise ConfigError(
                f"a conversation of {longest} tokens does not fit into {limits.blocks} device "
                f"blocks of {limits.block_tokens}: leave it out, or take a larger GPU"
            )
        self.now = 0.0
        self.iterations = 0
        self.recorder = Recorder()
        self.inversion = InversionMeter()
        self.overhead = 0.0  # CPU seconds spent deciding
        self._memory = memory
        self._steps = steps
        self._limits = limits
        self._window_seconds = window_bytes / memory.link.pricing.bandwidth
        self._scripts = scripts
        self._trace = trace
        self._clock_epoch = -1
        wall_clock = limits.epoch_seconds is not None
        self._scheduler = PriorityScheduler(
            FixedPolicy() if wall_clock else TracePolicy(trace),
            blocks=limits.blocks,
            slots=limits.slots,
            epoch=2**62 if wall_clock else limits.epoch,
            quantum=limits.quantum,
            headroom=int(limits.headroom * limits.blocks),
        )
        self._all: dict[Hashable, _Conversation] = {
            i: _Conversation(i, script) for i, script in enumerate(scripts)
        }
        self._due = [(script.arrival, i) for i, script in enumerate(scripts)]
        heapq.heapify(self._due)
        self._active: dict[Hashable, _Conversation] = {}  # with KV, and a turn to do
        self._running: dict[Hashable, _Conversation] = {}
        self._prefilling: dict[Hashable, _Conversation] = {}
        self._decoding = 0
        self._context = 0  # tokens of those that decode
        self._fresh: list[_Conversation] = []
        self._grow_at: dict[int, list[tuple[_Conversation, int]]] = {}
        self._stop_at: dict[int, list[tuple[_Conversation, int]]] = {}
        self._epoch = -1
        self._last_step: float | None = None
        self._last_end = 0.0

    @property
    def done(self) -> bool:
        """Whether all turns have been served."""
        return not self._due and not len(self._scheduler)

    def serve(
        self, iterations: int | None = None, *, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Run so many iterations, or until all is served.

        Parameters
        ----------
        on_progress : callable, optional
            Told now and then how many turns have been served in all.
        """
        last = None if iterations is None else self.iterations + iterations
        while not self.done and self.iterations != last:
            self._step()
            if on_progress and self.iterations % 512 == 0:
                on_progress(self.recorder.turns)

    def close(self) -> None:
        """Free what is left and end all transfers; nothing may have leaked."""
        for c in list(self._running.values()):
            self._preempt(c)
        self._memory.close(self.now)

    # -- one iteration -------------------------------------------------------------------------

    def _step(self) -> None:
        due, now = self._due, self.now
        begin = process_time()
        while due and due[0][0] <= now:
            at, i = heapq.heappop(due)
            self._begin_turn(self._all[i], at)
        if self._limits.epoch_seconds is not None:
            self._tick(self._limits.epoch_seconds)
        memory, scheduler = self._memory, self._scheduler
        decision = scheduler.schedule(memory.available())
        if scheduler.current_epoch != self._epoch:
            self._epoch = scheduler.current_epoch
            self._tell_priorities()
        for sequence in decision.preempt:
            self._preempt(self._running[sequence])
        came = [self._all[i] for i in (*decision.resume, *decision.admit)]
        came = [c for c in came if self._switch_in(c)]
        for c, entry in self._grow_at.pop(self.iterations, ()):
            if c.entry == entry and c.decoding:
                self._grow_decoding(c)
        for c in came:
            if self._grow(c, c.length) and c.id not in memory.arriving:
                self._join(c)
        self.overhead += process_time() - begin
        ready = memory.switch(self.now, self._last_step)
        stall, self.now = ready - self.now, ready
        begin = process_time()
        landed = memory.landed()
        self.overhead += process_time() - begin
        for sequence, tokens in landed.items():
            self._land(self._all[sequence], tokens)
        if self._decoding or self._prefilling:
            self._forward(now, stall)
        else:
            self._wait(now, stall)

    def _begin_turn(self, c: _Conversation, at: float) -> None:
        prompt, output = c.script.turns[c.turn]
        c.length += prompt
        c.stop = c.length + output
        c.asked = at
        need = -(-c.length // self._limits.block_tokens)
        priority = 0.0 if self._clock_epoch < 0 else self._level(c)
        self._scheduler.add(c.id, need=need, index=c.id, swapped=c.started, priority=priority)
        if c.started:
            self._active[c.id] = c

    def _tick(self, seconds: float) -> None:
        """Priority updates by the clock: every sequence gets its level of the present epoch."""
        epoch = int(self.now / seconds)
        if epoch == self._clock_epoch:
            return
        self._clock_epoch = epoch
        for i, c in self._all.items():
            if i in self._scheduler:
                self._scheduler.set_priority(i, self._level(c))
        self._tell_priorities()

    def _level(self, c: _Conversation) -> float:
        return float(self._trace.levels[self._clock_epoch % self._trace.epochs, c.id])

    def _tell_priorities(self) -> None:
        for c in self._active.values():
            priority = self._scheduler.priority(c.id)
            if priority != c.priority:
                c.priority = priority
                self._memory.set_priority(c.id, priority)

    # -- in and out ------------------------------------------------------------------------------

    def _preempt(self, c: _Conversation) -> None:
        self._leave_batch(c)
        self._memory.preempt(c.id, c.computed)

    def _leave_batch(self, c: _Conversation) -> None:
        del self._running[c.id]
        if c.decoding:
            self._stop_decoding(c)
        else:
            self._prefilling.pop(c.id, None)

    def _switch_in(self, c: _Conversation) -> bool:
        """Bring `c` to the device; False if there is no room for it now."""
        memory = self._memory
        try:
            if c.started:
                c.computed = memory.resume(c.id, c.computed)
            else:
                memory.start(c.id, c.length, c.stop)
                c.started = True
                c.priority = self._scheduler.priority(c.id)
                memory.set_priority(c.id, c.priority)
                self._active[c.id] = c
        except OutOfBlocks:
            self._scheduler.deferred(c.id)
            return False
        self._running[c.id] = c
        return True

    def _land(self, c: _Conversation, tokens: int) -> None:
        """What was to arrive is there; `tokens` if all went well, else fewer."""
        c.computed = tokens
        if c.id in self._running:
            self._join(c)

    def _join(self, c: _Conversation) -> None:
        if c.asked is not None or c.length - c.computed > 1:
            self._prefilling[c.id] = c
        else:
            self._start_decoding(c, fresh=True)

    def _grow(self, c: _Conversation, tokens: int) -> int:
        """Get blocks for `tokens` of `c`; how many it has, 0 if it had to give way."""
        while c.id in self._running:
            try:
                blocks = self._memory.grow(c.id, tokens, c.stop)
            except OutOfBlocks:
                victim = self._scheduler.victim()  # at least `c` itself
                assert victim is not None
                self._preempt(self._all[victim])
                self._scheduler.yielded(victim)
            else:
                self._scheduler.update(c.id, held=blocks)
                return blocks
        return 0

    # -- decoding ----------------------------------------------------------------------------------

    def _start_decoding(self, c: _Conversation, *, fresh: bool) -> None:
        """From the next forward on; `fresh` if its last token did not come with the last one."""
        now = self.iterations
        c.decoding = True
        c.since, c.base = now, c.length
        c.entry += 1
        self._decoding += 1
        self._context += c.length
        if fresh:
            c.fresh = True
            self._fresh.append(c)
        last = now + c.stop - c.length - 1
        self._stop_at.setdefault(last, []).append((c, c.entry))
        # Who has just been switched in has blocks for its next token; whoever goes on after its
        # prompt has them for what is computed, and may need one at once.
        held = c.length if fresh else c.computed
        self._foresee_growth(c, -(-held // self._limits.block_tokens))

    def _foresee_growth(self, c: _Conversation, blocks: int) -> None:
        room = blocks * self._limits.block_tokens - c.base + 1
        if c.base + room < c.stop:  # else its turn ends before
            self._grow_at.setdefault(c.since + room, []).append((c, c.entry))

    def _grow_decoding(self, c: _Conversation) -> None:
        length = c.base + self.iterations - c.since
        if blocks := self._grow(c, length):
            self._foresee_growth(c, blocks)

    def _stop_decoding(self, c: _Conversation) -> None:
        done = self.iterations - c.since
        c.length = c.base + done
        c.computed = c.length - 1
        c.furthest = max(c.furthest, c.computed)
        c.decoding = False
        self._decoding -= 1
        self._context -= c.length
        if done:
            c.last_token = self._last_end
        if c.fresh:
            c.fresh = False
            self._fresh.remove(c)

    # -- forward -----------------------------------------------------------------------------------

    def _forward(self, begin: float, stall: float) -> None:
        budget = self._limits.prefill_tokens
        chunks: list[tuple[_Conversation, int]] = []
        for c in self._prefilling.values():
            tokens = min(c.length - c.computed, budget)
            chunks.append((c, tokens))
            budget -= tokens
            if not budget:
                break
        step = self._last_step = self._steps.seconds(
            self._decoding, self._context, [(tokens, c.computed) for c, tokens in chunks]
        )
        step += self._beside_swaps(step)
        self.now += step
        now, iteration = self.now, self.iterations
        recorder = self.recorder
        steady = self._decoding - len(self._fresh)
        if steady:
            recorder.gaps(now - self._last_end, steady)
        for c in self._fresh:
            c.fresh = False
            recorder.gaps(now - c.last_token, 1)
        self._fresh.clear()
        tokens_made = self._decoding
        self._context += self._decoding
        self.iterations += 1
        self._last_end = now
        for c, entry in self._stop_at.pop(iteration, ()):
            if c.entry == entry and c.decoding:
                self._stop_decoding(c)
                self._end_turn(c)
        for c, tokens in chunks:
            tokens_made += self._prefill(c, tokens)
        self.inversion.observe(now - begin, self._scheduler)
        recorder.iteration(
            stall=stall,
            step=step,
            tokens=tokens_made,
            running=len(self._running),
            arriving=len(self._memory.arriving),
            needed=self._limits.blocks - self._memory.available(),
        )

    def _beside_swaps(self, step: float) -> float:
        """How much longer an iteration takes because bytes move meanwhile.

        They take memory bandwidth; and the engine's own small copy in each direction waits until
        the window before it is through.
        """
        link = self._memory.link
        extra = 0.0
        for direction in Direction:
            if busy := link.busy_seconds(direction, self.now, step):
                extra += self._steps.traffic_seconds(busy * link.pricing.bandwidth)
                extra += min(busy, self._window_seconds)
        return extra

    def _prefill(self, c: _Conversation, tokens: int) -> int:
        """Take note of a computed chunk; 1 if it brought a token."""
        done = c.computed + tokens
        self.recorder.prefilled(tokens, max(0, min(c.furthest, done) - c.computed))
        c.computed = done
        c.furthest = max(c.furthest, done)
        if done < c.length:
            return 0
        del self._prefilling[c.id]
        self._memory.prefilled(c.id, done)
        now = self.now
        if c.asked is None:
            self.recorder.gaps(now - c.last_token, 1)
        else:
            self.recorder.first_token(now - c.asked)
            c.asked = None
        c.length += 1
        c.last_token = now
        if c.length == c.stop:
            self._end_turn(c)
        else:
            self._start_decoding(c, fresh=False)
        return 1

    def _end_turn(self, c: _Conversation) -> None:
        """A turn is over; the last token has been made, but not been computed on."""
        begin = process_time()
        self.recorder.turns += 1
        self._scheduler.remove(c.id)
        del self._running[c.id]
        del self._active[c.id]
        c.computed = c.length - 1
        c.turn += 1
        if c.turn == len(c.script.turns):
            self._memory.free(c.id, c.computed)
        else:
            if not self._memory.end_turn(c.id, c.computed):
                c.started = False
                c.computed = 0
            heapq.heappush(self._due, (c.script.next_turn(c.turn, self.now), c.id))
        self.overhead += process_time() - begin

    def _wait(self, begin: float, stall: float) -> None:
        """Let time pass until something lands or somebody comes."""
        self._last_step = None
        event = min([self._memory.link.next_end(), *(arrival for arrival, _ in self._due[:1])])
        if event == NEVER:
            raise RuntimeError(f"stuck after {self.now} s: nothing runs, moves or comes")
        if self._running:  # whoever has blocks waits for their content
            stall += max(0.0, event - self.now)
        self.now = max(self.now, event)
        self.inversion.observe(self.now - begin, self._scheduler)
        self.recorder.idle(stall)
