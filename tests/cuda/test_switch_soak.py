"""A `KVSwitch` on a CUDA device, all of it: attention reads on the stream what was computed.

Sequences grow, leave, come back, end turns and go, at random. A forward reads the KV of all tokens
of its sequence on the engine's stream, as attention would, and writes that of new ones; nobody
waits for anything but what `KVSwitch.step` waits for.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest

from kvswitch import HostMemoryExhausted, KVSwitch, OutOfBlocks

BLOCKS, BLOCK_TOKENS, TOKEN_BYTES = 20, 4, 64
BLOCK = BLOCK_TOKENS * TOKEN_BYTES
PLACES = [pytest.param("fake_cuda", id="fake"), pytest.param("real_cuda", marks=pytest.mark.gpu)]


class Cache:
    """What kvswitch looks at of a torch tensor."""

    is_cuda = True
    shape = (BLOCKS, BLOCK_TOKENS, TOKEN_BYTES)

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def data_ptr(self) -> int:
        return int(self.memory.address)

    def element_size(self) -> int:
        return 1

    def stride(self) -> tuple[int, ...]:
        return BLOCK, TOKEN_BYTES, 1


class Engine:
    """An engine of sequences without a model."""

    def __init__(self, place: Any, seed: int, **config: Any) -> None:
        from kvswitch_cuda import CudaBackend

        self.rng = random.Random(seed)
        self.cache = Cache(place.device(BLOCKS * BLOCK))
        self.backend = CudaBackend(0, copies="batch")
        self.context = self.backend.context
        self.stream = self.context.open_stream()
        self._scratch = place.host(1 << 20)
        self._used = 0
        self._reads: list[tuple[int, int, np.ndarray, Any]] = []
        settings = {"host_memory": 40 * BLOCK, "headroom": 0.0, "window": 4096, **config}
        self.switch = KVSwitch(
            self.cache, settings, block_tokens=BLOCK_TOKENS, backend=self.backend
        )
        self.computed: dict[int, int] = {}
        self.running: set[int] = set()
        self.ended: set[int] = set()
        self.checked = 0

    def values(self, sequence: int, tokens: int) -> np.ndarray:
        """KV of a sequence's tokens: [tokens, TOKEN_BYTES]."""
        of_token = (np.arange(tokens) * 13 + sequence * 101) % 251 + 1
        return np.repeat(of_token[:, None], TOKEN_BYTES, 1).astype(np.uint8)

    def iterate(self) -> None:
        rng, switch = self.rng, self.switch
        for sequence in sorted(self.computed):
            what = rng.random()
            if sequence in self.running:
                if what < 0.15:
                    self.preempt(sequence)
                elif what < 0.2:
                    switch.end_turn(sequence, self.computed[sequence])
                    self.running.discard(sequence)
                elif what < 0.23:
                    self.free(sequence)
            elif what < 0.35:
                try:
                    self.computed[sequence] = switch.resume(
                        sequence, self.computed[sequence]
                    ).tokens
                    self.running.add(sequence)
                except OutOfBlocks:
                    if self.running:
                        self.preempt(rng.choice(sorted(self.running)))
        if len(self.computed) < 7 and rng.random() < 0.4:
            self.begin(max(self.computed, default=0) + 1)
        grown = {}
        for sequence in sorted(self.running):
            tokens = self.computed[sequence] + rng.randint(1, 5)
            try:
                grown[sequence] = (tokens, switch.allocate(sequence, tokens))
            except OutOfBlocks:
                continue
        ready = switch.step(self.stream)
        for sequence, tokens in ready.landed.items():
            assert isinstance(sequence, int)
            self.computed[sequence] = tokens
        for sequence, (tokens, table) in grown.items():
            if sequence in self.running and sequence not in ready.arriving:
                self.forward(sequence, tokens, table)

    def begin(self, sequence: int) -> None:
        try:
            self.switch.allocate(sequence, 6)
        except OutOfBlocks:
            return
        self.computed[sequence] = 0
        self.running.add(sequence)

    def preempt(self, sequence: int) -> None:
        try:
            self.switch.preempt(sequence, self.computed[sequence])
        except HostMemoryExhausted:
            self.switch.discard(sequence, self.computed[sequence])
        self.running.discard(sequence)

    def free(self, sequence: int) -> None:
        self.switch.free(sequence)
        self.running.discard(sequence)
        del self.computed[sequence]

    def forward(self, sequence: int, tokens: int, table: Any) -> None:
        """Read what has been computed, then write what is new, both on the stream."""
        known, values = self.computed[sequence], self.values(sequence, tokens)
        blocks = table[: -(-known // BLOCK_TOKENS)].tolist()
        if self._used + 2 * len(table) * BLOCK > self._scratch.nbytes:
            self.check()
        self._reads.append((sequence, self._used, values[:known], table))
        for block in blocks:
            source = self.cache.data_ptr() + block * BLOCK
            self.copy(self._scratch.address + self._used, source, BLOCK)
            self._used += BLOCK
        for position in range(known, tokens):
            block, slot = divmod(position, BLOCK_TOKENS)
            place = self.cache.data_ptr() + int(table[block]) * BLOCK + slot * TOKEN_BYTES
            self._scratch.write(values[position], self._used)
            self.copy(place, self._scratch.address + self._used, TOKEN_BYTES)
            self._used += TOKEN_BYTES
        self.computed[sequence] = tokens

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        with self.context as context:
            assert context.driver.copy(dst, src, nbytes, self.stream) == 0

    def check(self) -> None:
        """Compare all that has been read since the last time."""
        with self.context as context:
            context.driver("cuStreamSynchronize", context.driver.api.CUstream(self.stream))
        scratch = self._scratch.read()
        for sequence, start, values, table in self._reads:
            found = scratch[start : start + values.size].reshape(values.shape)
            assert (found == values).all(), f"sequence {sequence} in blocks {table}"
            self.checked += len(values)
        self._reads.clear()
        self._used = 0
        self.switch.check_integrity()

    def close(self) -> None:
        self.context.close_stream(self.stream)
        self.switch.close()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "fake_cuda":
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("strategy", ["adaptive", "async", "sync", "serial"])
@pytest.mark.parametrize("seed", range(2))
def test_attention_reads_what_was_computed(place: Any, strategy: str, seed: int) -> None:
    engine = Engine(place, seed, strategy=strategy)
    try:
        for i in range(250):
            engine.iterate()
            if i % 25 == 0:
                engine.check()
        engine.check()
        stats = engine.switch.stats()
        assert engine.checked > 2000
        assert stats.blocks_in > 30
        assert stats.blocks_out > 30
    finally:
        engine.close()


@pytest.mark.parametrize("place", PLACES[:1], indirect=True)
def test_it_would_be_found_out_if_the_stream_did_not_wait(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import CudaBackend

    monkeypatch.setattr(CudaBackend, "hold", lambda self, stream, event: None)
    place.reset(pause_us=3000)
    engine = Engine(place, 0, strategy="sync")

    def run() -> None:
        for _ in range(100):
            engine.iterate()
            engine.check()

    try:
        with pytest.raises(AssertionError, match="in blocks"):
            run()
    finally:
        engine.close()
