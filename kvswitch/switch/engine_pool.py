"""The planner for engines that hand out device blocks themselves.

`SwapManager` owns the device pool. Where the engine has one of its own, with reference counts and a
prefix cache (vLLM), `EngineSwapManager` plans the same copies for blocks it is told of. Its two
rules are those of `SwapManager`, kept by other means:

* a block that a swap-out reads is *held*, by a reference in the engine's pool, until it has ended;
* where the engine needs such a block earlier, the hold is given up (`give_way`): the block is
  *leaving*, and whoever writes it (`written`) waits for that one transfer first.

One file, though a long one: verbs, orders and ends of transfers change the same few books.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvswitch.config import StrategyName
from kvswitch.copies import Fill, HostCopies, Lease
from kvswitch.errors import ConfigError, HostMemoryExhausted, IntegrityError, InvalidTransition
from kvswitch.messages import Direction, Observations, SwapOrders, Transfer
from kvswitch.switch.orders import OrderList
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.strategy import Arrival, Strategy
from kvswitch.transfer.plan import coalesce

__all__ = ["EnginePool", "EngineSwapManager"]

_LEAST = float("-inf")
"""Priority of those that have ended: they take host memory from nobody."""


class EnginePool(Protocol):
    """What the planner needs of the engine's block pool."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block; all of them are in use."""

    def release(self, blocks: Sequence[int], *, copied: bool = False) -> None:
        """Take a reference from each block.

        `copied`: the host has their content, or is about to, for an owner that will come back for
        it; so this is what may be overwritten first.
        """

    def keep(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> int:
        """Hold the leading blocks that still have the content that `keys` name; how many."""


@dataclass(slots=True, eq=False)
class _Part:
    """What a swap-out brings one owner.

    Attributes
    ----------
    last : bool
        Whether the owner is to be forgotten when it has ended.
    """

    owner: Hashable
    fill: Fill
    last: bool


@dataclass(slots=True, eq=False)
class _Out:
    """A swap-out under way.

    Attributes
    ----------
    parts : list of _Part
        That of the owner whose blocks are sent, and those of owners with the same content.
    held : bool
        Whether the device blocks are held; else they are leaving.
    """

    transfer: Transfer
    parts: list[_Part]
    blocks: list[int]
    held: bool


@dataclass(slots=True, eq=False)
class _In:
    """A swap-in, planned with the next orders: it may write what swap-outs before them read."""

    owner: Hashable
    lease: Lease
    blocks: list[int]
    first: int  # tokens on the device whatever becomes of it
    needs: tuple[tuple[Fill, int], ...]
    wait: bool
    transfer: Transfer | None = None
    void: bool = False  # what it brings means nothing any more


@dataclass(slots=True, eq=False)
class _Idle:
    """What is to be sent when nothing else goes out, if it is still there by then."""

    owner: Hashable
    blocks: list[int]
    keys: list[Hashable]


class EngineSwapManager(OrderList):
    """Plans copies between an engine's own device blocks and the host.

    As pure as `SwapManager`: no clock, no thread, no device; the same calls give the same orders.

    Parameters
    ----------
    pool : EnginePool
    host_blocks, block_tokens, block_bytes, first_group, strategy, reuse, on_lost
        As for `SwapManager`.
    swap : bool
        False: send nothing; whatever leaves the device is recomputed (for comparison).

    Raises
    ------
    ConfigError
        A size is out of its range.
    """

    def __init__(
        self,
        pool: EnginePool,
        host_blocks: int,
        block_tokens: int,
        *,
        block_bytes: int = 1,
        first_group: int = 60,
        strategy: StrategyName = "adaptive",
        swap: bool = True,
        reuse: bool = True,
        on_lost: Callable[[Hashable, int], None] | None = None,
    ) -> None:
        super().__init__()
        if block_bytes < 1:
            raise ConfigError(f"block_bytes must be at least 1, got {block_bytes}")
        self.copies = HostCopies(
            host_blocks, block_tokens, first_group=first_group, on_lost=on_lost
        )
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes
        self._pool = pool
        self._swap = swap
        self._reuse = reuse
        self._strategy = Strategy(strategy)
        self._stats = SwapStats()
        self._keys: dict[Hashable, list[Hashable]] = {}
        self._out: dict[int, _Out] = {}
        self._into: dict[int, _In] = {}
        self._arriving: list[_In] = []
        self._idle: dict[Hashable, _Idle] = {}  # by owner, who ended first first
        self._leaving: dict[int, int] = {}  # device block -> newest swap-out that reads it
        self._wait: set[int] = set()
        self._step = 0

    # -- questions -------------------------------------------------------------------------------

    def reach(self, owner: Hashable, keys: Sequence[Hashable] = ()) -> int:
        """Tokens of `owner` that could be swapped in now, its own copies or those of `keys`. Pure.

        Parameters
        ----------
        keys : sequence of Hashable
            Content keys of its leading full blocks.
        """
        return self.copies.reach(owner, keys)

    def worth_waiting(self, tokens: int, running: int) -> bool:
        """Whether a batch of `running` sequences should wait for a swap-in of so many tokens."""
        nbytes = self._blocks(tokens) * self.block_bytes
        return self._strategy.wait_for([Arrival(0, nbytes)], running) > 0

    @property
    def under_way(self) -> tuple[int, ...]:
        """Ids of transfers that have not ended."""
        return (*self._out, *self._into)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or about to be."""
        return bool(self._out or self._into or self._arriving or self._idle)

    @property
    def held_blocks(self) -> int:
        """Device blocks that swap-outs hold: the engine has them back when these have ended."""
        return sum(len(out.blocks) for out in self._out.values() if out.held)

    def holds(self) -> list[int]:
        """Device blocks that transfers hold, once for each hold; to be compared with a pool."""
        out = [block for out in self._out.values() if out.held for block in out.blocks]
        arriving = [*self._into.values(), *self._arriving]
        return out + [block for incoming in arriving for block in incoming.blocks]

    @property
    def leaving(self) -> bool:
        """Whether some blocks are leaving: what a step writes has to be told (`written`)."""
        return bool(self._leaving)

    def stats(self) -> SwapStats:
        """Counters so far."""
        self._stats.contaminated_blocks = self.copies.contaminated_blocks
        return self._stats

    # -- verbs -----------------------------------------------------------------------------------

    def swap_out(
        self,
        owner: Hashable,
        tokens: int,
        blocks: Sequence[int],
        *,
        keys: Sequence[Hashable] = (),
        priority: float = 0.0,
        hold: bool = True,
        last: bool = False,
    ) -> int:
        """Send what the host lacks of `owner`, which is leaving the device.

        Parameters
        ----------
        tokens : int
            Tokens whose KV is, or with the step under way will be, in `blocks`.
        blocks : sequence of int
            Its device blocks in order, still the engine's to give.
        keys : sequence of Hashable
            Content keys of its leading full blocks.
        priority : float
            Who loses host memory first; larger is more important.
        hold : bool
            Hold the blocks that are read. False: they are leaving at once (see `give_way`).
        last : bool
            Forget the owner once its copies are published.

        Returns
        -------
        int
            Tokens that the host will have. Fewer if it has no room: the rest is recomputed.

        Raises
        ------
        InvalidTransition
            `blocks` do not hold so many tokens.
        """
        if not 0 <= tokens <= len(blocks) * self.block_tokens:
            raise InvalidTransition(
                f"{owner!r} cannot have computed {tokens} tokens in {len(blocks)} blocks"
            )
        self._stats.preemptions += not last
        if not self._swap:
            return 0
        if owner in self._idle:  # another of that name, which has ended
            self.drop(owner)
        copies = self.copies
        fill = self._fill(owner, tokens, keys, priority, last=last)
        covered = copies.covered(owner)
        sent = 0
        if fill is not None:
            sent = len(fill.blocks)
            ids = list(blocks[fill.first : fill.first + sent])
            self._send(owner, fill, ids, hold=hold, last=last)
        self._stats.blocks_spared += self._blocks(covered) - sent
        copies.set_resident(owner, False)
        if last and fill is None:
            self._retired(owner)
        return covered

    def retire(
        self, owner: Hashable, tokens: int, blocks: Sequence[int], keys: Sequence[Hashable]
    ) -> None:
        """`owner` has ended; `send_idle` sends its full blocks, for others to find by `keys`.

        The blocks are not held: whoever needs memory may have them, and then they are not sent.
        """
        full = min(tokens // self.block_tokens, len(keys), len(blocks))
        if not full or not self._swap:
            self.drop(owner)
            return
        self._idle[owner] = _Idle(owner, list(blocks[:full]), list(keys[:full]))
        self.set_priority(owner, _LEAST)

    def leave(self, owner: Hashable) -> None:
        """`owner` has ended while it was off the device: what is being sent of it still lands."""
        self.set_priority(owner, _LEAST)
        self._retired(owner)

    @property
    def may_send_idle(self) -> bool:
        """Whether some that have ended wait to be sent, and nothing else goes out."""
        return bool(self._idle and not self._out)

    def send_idle(self, written: Container[int] = ()) -> None:
        """Send one that has ended (`retire`) if nothing else goes out.

        Parameters
        ----------
        written : container of int
            Blocks that the step's forward writes. The engine's pool may have their keys already.
        """
        while self.may_send_idle:
            idle = self._idle.pop(next(iter(self._idle)))
            there = next((i for i, b in enumerate(idle.blocks) if b in written), len(idle.blocks))
            del idle.blocks[there:], idle.keys[there:]
            self._stats.idle_copies += self._send_retired(idle)

    def send_ended(self, owner: Hashable) -> None:
        """`owner` has ended (`retire`) and its blocks are about to go: send them now."""
        if (idle := self._idle.pop(owner, None)) is not None:
            self._send_retired(idle)

    def swap_in(
        self,
        owner: Hashable,
        first: int,
        tokens: int,
        blocks: Sequence[int],
        *,
        keys: Sequence[Hashable] = (),
        wait: bool = False,
        by_layer: bool = False,
    ) -> int:
        """Bring tokens `first` to `tokens` of `owner` into its device blocks, with the next orders.

        Parameters
        ----------
        first : int
            Tokens that are on the device already; whole blocks.
        blocks : sequence of int
            All its device blocks in order.
        wait : bool
            The step's forward waits for it.
        by_layer : bool
            Unless it waits for all of it, the step's forward waits for each layer as it comes to
            it (`SwapWorker.wait_regions`). A last block that is only partly filled, in which that
            forward goes on writing, comes in a transfer of its own, and first.

        Returns
        -------
        int
            Tokens that will be there. Less than asked for if copies were lost since `reach`.
        """
        copies = self.copies
        if keys:
            copies.adopt(owner, keys)
        copies.truncate(owner, tokens)
        tokens = min(tokens, copies.covered(owner))
        begin = first // self.block_tokens
        if tokens <= first:
            return first
        full = tokens // self.block_tokens
        if by_layer and not wait and begin < full and tokens % self.block_tokens:
            self._bring(owner, full * self.block_tokens, tokens, blocks, wait=True)
            self._bring(owner, first, full * self.block_tokens, blocks, wait=False)
        else:
            self._bring(owner, first, tokens, blocks, wait=wait or (by_layer and begin == full))
        self._stats.resumptions += 1
        return tokens

    def give_way(self, blocks: int) -> None:
        """Give up holds on at least `blocks` blocks, if so many are held, those that end first."""
        for out in self._out.values():
            if blocks <= 0:
                return
            if out.held:
                out.held = False
                self._leave(out)
                self._pool.release(out.blocks, copied=self._comes_back(out))
                blocks -= len(out.blocks)

    def written(self, blocks: Sequence[int]) -> None:
        """Say that the coming forward writes these blocks: it waits for those that are leaving."""
        if self._leaving:
            self._wait.update(self._leaving[b] for b in blocks if b in self._leaving)

    def truncate(self, owner: Hashable, tokens: int) -> None:
        """Only the first `tokens` of `owner` still mean what its copies hold."""
        self.copies.truncate(owner, tokens)
        if owner in self._keys:
            del self._keys[owner][tokens // self.block_tokens :]

    def set_priority(self, owner: Hashable, priority: float) -> None:
        """Set how much `owner` matters, if it has copies."""
        if owner in self.copies:
            self.copies.set_priority(owner, priority)

    def drop(self, owner: Hashable) -> None:
        """Forget `owner`: its transfers are cancelled. What it published can still be adopted."""
        for out in self._out.values():
            wanted_by = {part.owner for part in out.parts if part.owner in self.copies}
            if wanted_by == {owner}:
                self.cancel(out.transfer)
            for part in out.parts:
                part.last &= part.owner != owner  # another of that name may come
        for incoming in self._into.values():
            if incoming.owner == owner and incoming.transfer is not None:
                self.cancel(incoming.transfer)
        self._idle.pop(owner, None)
        self._forget(owner)

    def invalidate_all(self) -> None:
        """No copy is valid any more (weights changed, cache reset); give up all holds."""
        idle, self._idle = self._idle, {}
        self.copies.invalidate_all()
        self._keys.clear()
        for owner in idle:
            self._forget(owner)
        for out in self._out.values():
            self.cancel(out.transfer)
        for incoming in (*self._into.values(), *self._arriving):
            incoming.void = True
            if incoming.transfer is not None:
                self.cancel(incoming.transfer)
        self.give_way(self.held_blocks)

    # -- Algorithm 1 -----------------------------------------------------------------------------

    def observe(self, observations: Observations) -> tuple[Hashable, ...]:
        """Take note of transfers that have ended, and of measurements.

        Returns
        -------
        tuple of Hashable
            Owners of swap-ins that have brought nothing valid, though the swap-in itself may have
            gone well: what it read was never sent. These tokens are to be recomputed.

        Raises
        ------
        InvalidTransition
            A transfer is not under way: it has been reported twice, or was never planned.
        """
        ended = {*observations.completed, *observations.failed}
        for transfer in ended:
            if transfer not in self._out and transfer not in self._into:
                raise InvalidTransition(f"transfer {transfer} cannot have ended: not under way")
        self._strategy.observe(observations.measurements, observations.step_seconds)
        lost = []
        for transfer in sorted(ended):
            ok = transfer not in observations.failed
            if transfer in self._out:
                self._end_out(self._out.pop(transfer), ok=ok)
            elif not self._end_in(incoming := self._into.pop(transfer), ok=ok):
                lost.append(incoming.owner)
        return tuple(dict.fromkeys(lost))

    def orders(self) -> tuple[SwapOrders, dict[int, Hashable]]:
        """What is to be done in the coming step, and whose swap-in each planned one is."""
        self._step += 1
        owners: dict[int, Hashable] = {}
        for incoming in self._arriving:
            after = [
                out.transfer.id
                for out in self._out.values()
                if any(part.fill is fill for fill, _ in incoming.needs for part in out.parts)
            ]
            first = len(incoming.lease.blocks) - len(incoming.blocks)
            runs = coalesce(incoming.lease.blocks[first:], np.array(incoming.blocks, np.int32))
            transfer = incoming.transfer = self.plan(Direction.IN, runs, after)
            self._into[transfer.id] = incoming
            owners[transfer.id] = incoming.owner
            if incoming.wait:
                self._wait.add(transfer.id)
            self._stats.blocks_in += len(incoming.blocks)
            self._stats.copies_in += len(runs)
        self._arriving.clear()
        wait = tuple(sorted(t for t in self._wait if t in self._out or t in self._into))
        self._stats.conflicts += sum(t in self._out for t in wait)
        self._wait.clear()
        planned, cancelled = self.take_list()
        cancelled = tuple(t for t in cancelled if t in self._out or t in self._into)
        return SwapOrders(self._step, planned, cancelled, wait), owners

    # -- inside ----------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _fill(
        self,
        owner: Hashable,
        tokens: int,
        keys: Sequence[Hashable],
        priority: float,
        *,
        last: bool,
    ) -> Fill | None:
        """Host blocks for what the host lacks of `owner`; None if nothing, or no room for any."""
        copies = self.copies
        known = owner in copies
        named = list(keys[: tokens // self.block_tokens])
        copies.truncate(owner, tokens)
        if named:
            copies.adopt(owner, named)
            # What others of the same content are sending need not be sent again.
            for followed in copies.follow(owner, named):
                (out,) = (o for o in self._out.values() if o.parts[0].fill is followed.source)
                out.parts.append(_Part(owner, followed, last))
        self._keys[owner] = named
        copies.set_priority(owner, priority)
        self._publish(owner, 0)
        if tokens <= copies.covered(owner):
            return None
        try:
            return copies.begin(owner, tokens)
        except HostMemoryExhausted:
            if not known and not copies.covered(owner):
                self._forget(owner)
            return None

    def _send(self, owner: Hashable, fill: Fill, ids: list[int], *, hold: bool, last: bool) -> None:
        transfer = self.plan(Direction.OUT, coalesce(np.array(ids, np.int32), fill.blocks))
        out = self._out[transfer.id] = _Out(transfer, [_Part(owner, fill, last)], ids, hold)
        self.copies.announce(fill, self._keys[owner])
        if hold:
            self._pool.hold(ids)
        else:
            self._leave(out)
        if fill.first:
            self._stats.blocks_out_incremental += len(ids)
            self._stats.copies_out_incremental += len(transfer.runs)
        else:
            self._stats.blocks_out_full += len(ids)
            self._stats.copies_out_full += len(transfer.runs)

    def _bring(
        self, owner: Hashable, first: int, tokens: int, blocks: Sequence[int], *, wait: bool
    ) -> None:
        begin = first // self.block_tokens
        lease = self.copies.pin(owner, tokens)
        last = len(lease.blocks)
        ids = list(blocks[begin:last])
        needs = tuple(
            (part.fill, max(begin, part.fill.first) * self.block_tokens)
            for out in self._out.values()
            for part in out.parts
            if part.owner == owner
            and part.fill.first < last
            and part.fill.first + len(part.fill.blocks) > begin
        )
        self._pool.hold(ids)
        self._arriving.append(_In(owner, lease, ids, first, needs, wait))

    def _leave(self, out: _Out) -> None:
        for block in out.blocks:
            self._leaving[block] = max(out.transfer.id, self._leaving.get(block, -1))

    def _send_retired(self, idle: _Idle) -> bool:
        """Send what is left of one that has ended, and forget it then; whether it was anything."""
        kept = self._pool.keep(idle.blocks, idle.keys)
        tokens = kept * self.block_tokens
        held = idle.blocks[:kept]
        fill = None
        if tokens:
            fill = self._fill(idle.owner, tokens, idle.keys, _LEAST, last=True)
        if fill is not None:
            ids = held[fill.first : fill.first + len(fill.blocks)]
            self._send(idle.owner, fill, ids, hold=True, last=True)
        self._pool.release(held)
        if fill is None:
            self._retired(idle.owner)
        return fill is not None

    def _end_out(self, out: _Out, *, ok: bool) -> None:
        wanted = False
        for part in out.parts:
            (self.copies.commit if ok else self.copies.abort)(part.fill)
            wanted |= part.owner in self.copies  # else it was cancelled
        self._stats.transfers_failed += wanted and not ok
        if out.held:
            self._pool.release(out.blocks, copied=ok and self._comes_back(out))
        else:
            for block in out.blocks:
                if self._leaving.get(block) == out.transfer.id:
                    del self._leaving[block]
        for part in out.parts:
            if part.owner in self.copies:
                self._publish(part.owner, part.fill.first)
                if part.last:
                    self._retired(part.owner)

    def _comes_back(self, out: _Out) -> bool:
        """Whether somebody waits who will want what a swap-out brings to the host."""
        return any(part.owner in self.copies and not part.last for part in out.parts)

    def _end_in(self, incoming: _In, *, ok: bool) -> bool:
        """End a swap-in; whether what it has brought is valid."""
        self.copies.release(incoming.lease)
        self._pool.release(incoming.blocks)
        owner = incoming.owner
        arrived = ok and not incoming.void and all(fill.committed for fill, _ in incoming.needs)
        if owner not in self.copies:
            return arrived
        if not arrived:
            # Whether the link, the copy or its swap-out was at fault: do not try it twice.
            self._stats.transfers_failed += not ok
            self.truncate(owner, incoming.first)
        elif self._reuse:
            self.copies.set_resident(owner, True)
        else:
            self.copies.truncate(owner, 0)
        return arrived

    def _publish(self, owner: Hashable, first: int) -> None:
        keys = self._keys.get(owner, ())
        complete = self.copies.valid(owner) // self.block_tokens
        for index in range(first, min(len(keys), complete)):
            self.copies.publish(owner, index, keys[index])

    def _retired(self, owner: Hashable) -> None:
        """Forget one that has ended, once nothing of it is under way any more."""
        pending = [p for out in self._out.values() for p in out.parts if p.owner == owner]
        for part in pending:
            part.last = True
        if not pending:
            self._forget(owner)

    def _forget(self, owner: Hashable) -> None:
        self._keys.pop(owner, None)
        if owner in self.copies:
            self.copies.drop(owner)

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves."""
        self.copies.check_integrity()
        parts = sum(len(out.parts) for out in self._out.values())
        leases = len(self._into) + len(self._arriving) + parts
        if self.copies.num_leases() != leases:
            raise IntegrityError(f"{self.copies.num_leases()} leases on copies, {leases} transfers")
        leaving = {b for out in self._out.values() if not out.held for b in out.blocks}
        if leaving != self._leaving.keys():
            raise IntegrityError("blocks are leaving that no swap-out reads")
