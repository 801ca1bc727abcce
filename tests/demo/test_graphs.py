"""The model of fixed shapes: what a GPU runs as CUDA graphs, here one operation after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvswitch import ConfigError  # noqa: E402
from kvswitch_demo.graphs import GraphLlama  # noqa: E402
from kvswitch_demo.model import Chunk, Llama, LlamaConfig, Weights  # noqa: E402

BLOCK_TOKENS, BLOCKS = 16, 64
CONFIG = LlamaConfig(
    vocab=101, hidden=64, ffn=96, layers=2, heads=6, kv_heads=2, head_dim=16, context=160,
    rope_theta=10_000.0, norm_eps=1e-5,
)  # fmt: skip


def on(device: str) -> Weights:
    weights = Weights.random(CONFIG)
    moved: Callable[[Any], Any] = lambda t: None if t is None else t.to(device)  # noqa: E731
    return replace(
        weights,
        embedding=moved(weights.embedding),
        layers=[replace(x, **{k: moved(t) for k, t in vars(x).items()}) for x in weights.layers],
        output_norm=moved(weights.output_norm),
        output=moved(weights.output),
    )


def needs_cuda() -> Any:
    return pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda()])], scope="module"
)
def model(request: pytest.FixtureRequest) -> Iterator[GraphLlama]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield GraphLlama(CONFIG, on(request.param), rows=16)
    torch.set_num_threads(threads)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    generated: list[int] = np.random.default_rng(seed).integers(0, CONFIG.vocab, count).tolist()
    return generated


def blocks(first: int) -> Any:
    """A block table for the whole context; other `first` (0 to 2) share nothing with it."""
    ids = np.arange(first, BLOCKS, 3, dtype=np.int32)
    return np.random.default_rng(first).permutation(ids)[: -(-CONFIG.context // BLOCK_TOKENS)]


def cache_of(model: Llama) -> Any:
    return model.new_cache(BLOCKS, BLOCK_TOKENS).fill_(float("nan"))


def run(model: Llama, cache: Any, *chunks: tuple[list[int], int, int]) -> Any:
    """Logits behind chunks (tokens, start, first block)."""
    made = [Chunk(tokens, start, blocks(first)) for tokens, start, first in chunks]
    return model.forward(made, cache).cpu()


def test_it_is_the_same_model(model: GraphLlama) -> None:
    tokens = tokens_of(70)
    plain = Llama(CONFIG, Weights.random(CONFIG))
    expected = run(plain, cache_of(plain), (tokens, 0, 0))
    found = run(model, cache_of(model), (tokens, 0, 0))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_results_ignore_chunks_and_company_bit_for_bit(model: GraphLlama) -> None:
    tokens, other = tokens_of(75), tokens_of(40, 1)
    alone = run(model, cache_of(model), (tokens, 0, 0))[0]
    cache = cache_of(model)
    run(model, cache, (tokens[:33], 0, 0))
    run(model, cache, (other, 0, 1), (tokens[33:74], 33, 0))
    last = run(model, cache, (tokens_of(9, 2), 0, 2), (tokens[74:], 74, 0), ([5], 40, 1))
    assert torch.equal(last[1], alone)


def test_swapped_blocks_give_the_same_tokens(model: GraphLlama) -> None:
    tokens = tokens_of(50)
    cache = cache_of(model)
    run(model, cache, (tokens[:49], 0, 0))
    elsewhere = cache_of(model)
    elsewhere[blocks(1).astype(np.int64)] = cache[blocks(0).astype(np.int64)]
    stayed = run(model, cache, (tokens[49:], 49, 0))
    moved = run(model, elsewhere, (tokens[49:], 49, 1))
    assert torch.equal(stayed, moved)
    elsewhere[int(blocks(1)[0])] += 1
    assert not torch.equal(run(model, elsewhere, (tokens[49:], 49, 1)), stayed)


def test_nonsense_is_refused(model: GraphLlama) -> None:
    with pytest.raises(ConfigError, match="at least one chunk"):
        model.forward([], cache_of(model))
    with pytest.raises(ConfigError, match="exceed the model's context"):
        run(model, cache_of(model), (tokens_of(200), 0, 0))
