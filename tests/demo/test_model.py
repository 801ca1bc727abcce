"""The model: right, and its results ignore chunking, company, place and garbage, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kvswitch import ConfigError  # noqa: E402
from kvswitch.messages import BlockIds  # noqa: E402
from kvswitch_demo.model import (  # noqa: E402
    Chunk,
    LayerWeights,
    Llama,
    LlamaConfig,
    Weights,
)

BLOCK_TOKENS = 16
BLOCKS = 96
CONFIG = LlamaConfig(
    vocab=101,
    hidden=64,
    ffn=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=16,
    context=300,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["onednn", "mkl"])
def llama(request: pytest.FixtureRequest) -> Llama:
    """The model, with either of the two products that the CPU offers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "mkl":
            patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
        return Llama(CONFIG, Weights.random(CONFIG))


def table(first: int, tokens: int, seed: int = 0) -> BlockIds:
    """A block table scattered over a third of the cache; tables of other `first` share nothing."""
    ids = np.random.default_rng(seed).permutation(np.arange(first, BLOCKS, 3, dtype=np.int32))
    return ids[: -(-tokens // BLOCK_TOKENS)]


def poisoned_cache(llama: Llama, block_tokens: int = BLOCK_TOKENS) -> torch.Tensor:
    return llama.new_cache(BLOCKS, block_tokens).fill_(float("nan"))


def tokens_of(count: int, seed: int = 0) -> list[int]:
    generated: list[int] = np.random.default_rng(seed).integers(0, CONFIG.vocab, count).tolist()
    return generated


def at_once(llama: Llama, tokens: list[int]) -> torch.Tensor:
    """Logits after `tokens`, processed alone and in one piece."""
    blocks = table(0, len(tokens))
    return llama.forward([Chunk(tokens, 0, blocks)], poisoned_cache(llama))[0]


def naive_logits(config: LlamaConfig, weights: Weights, tokens: list[int]) -> torch.Tensor:
    """Llama as the textbook has it, in float64: no cache, no batch, rotation by sine and cosine."""

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * scale.double()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [tokens, head_dim]
        pair = torch.arange(config.head_dim // 2, dtype=torch.float64)
        angle = torch.arange(len(x))[:, None] / config.rope_theta ** (2 * pair / config.head_dim)
        even, odd = x[:, 0::2], x[:, 1::2]
        turned = torch.empty_like(x)
        turned[:, 0::2] = even * angle.cos() - odd * angle.sin()
        turned[:, 1::2] = even * angle.sin() + odd * angle.cos()
        return turned

    x = weights.embedding[tokens].double()
    unseen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in weights.layers:
        heads = (norm(x, layer.attention_norm) @ layer.qkv.double().T).split(config.head_dim, -1)
        q, k, v = (
            heads[: config.heads],
            heads[config.heads : -config.kv_heads],
            heads[-config.kv_heads :],
        )
        results = []
        for number, query in enumerate(q):
            shared = number // (config.heads // config.kv_heads)
            scores = rotate(query) @ rotate(k[shared]).T / config.head_dim**0.5
            results.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[shared])
        x = x + torch.cat(results, -1) @ layer.attention_output.double().T
        gate, up = (norm(x, layer.ffn_norm) @ layer.gate_up.double().T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ layer.down.double().T
    output = weights.embedding if weights.output is None else weights.output
    return norm(x[-1], weights.output_norm) @ output.double().T


@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 128, 200, 300])
def test_logits_are_those_of_plain_attention(llama: Llama, length: int) -> None:
    tokens = tokens_of(length)
    expected = naive_logits(CONFIG, Weights.random(CONFIG), tokens)
    torch.testing.assert_close(at_once(llama, tokens).double(), expected, atol=2e-5, rtol=2e-5)


def test_without_an_output_matrix_the_embedding_serves() -> None:
    weights = replace(Weights.random(CONFIG), output=None)
    logits = at_once(Llama(CONFIG, weights), [1, 2, 3])
    expected = naive_logits(CONFIG, weights, [1, 2, 3])
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=2e-5)


def test_decoding_token_by_token_gives_the_logits_of_one_prefill(llama: Llama) -> None:
    tokens = tokens_of(140)
    cache, blocks = poisoned_cache(llama), table(1, 140)
    for position, token in enumerate(tokens):
        logits = llama.forward([Chunk([token], position, blocks)], cache)[0]
        assert torch.equal(logits, at_once(llama, tokens[: position + 1]))


cuts = st.lists(st.integers(1, 199), max_size=6).map(lambda cut: sorted({*cut, 200}))
companies = st.lists(st.sampled_from([1, 2, 5, 33, 70]), max_size=3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=cuts, companies=st.lists(companies, min_size=7, max_size=7), place=st.integers(0, 3))
def test_neither_chunks_nor_company_nor_place_in_the_batch_change_a_bit(
    llama: Llama, cuts: list[int], companies: list[list[int]], place: int
) -> None:
    tokens, others = tokens_of(200), tokens_of(70, seed=1)
    cache, start = poisoned_cache(llama), 0
    for stop, company in zip(cuts, companies, strict=False):
        batch = [Chunk(others[:n], 0, table(1, 70)) for n in company[:1]]
        batch += [Chunk(others[:n], 0, table(2, 70)) for n in company[1:2]]
        mine = min(place, len(batch))
        batch.insert(mine, Chunk(tokens[start:stop], start, table(0, 200)))
        logits = llama.forward(batch, cache)
        assert torch.equal(logits[mine], at_once(llama, tokens[:stop]))
        for number, chunk in enumerate(batch):
            if number != mine:
                assert torch.equal(logits[number], at_once(llama, list(chunk.tokens)))
        start = stop


@pytest.mark.parametrize("block_tokens", [1, 5, 16, 64, 100])
def test_the_size_of_a_block_does_not_matter(llama: Llama, block_tokens: int) -> None:
    tokens = tokens_of(90)
    cache = llama.new_cache(90, block_tokens).fill_(float("nan"))
    blocks = np.random.default_rng(3).permutation(90).astype(np.int32)
    llama.forward([Chunk(tokens[:70], 0, blocks)], cache)
    logits = llama.forward([Chunk(tokens[70:], 70, blocks)], cache)[0]
    assert torch.equal(logits, at_once(llama, tokens))


def test_a_cache_recomputed_in_other_chunks_and_blocks_is_the_same_to_the_bit(
    llama: Llama,
) -> None:
    tokens = tokens_of(150)
    cache = poisoned_cache(llama)
    first, second = table(0, 150), table(1, 150)
    for start in range(0, 150, 50):
        llama.forward([Chunk(tokens[start : start + 50], start, first)], cache)
    llama.forward([Chunk(tokens, 0, second)], cache)
    whole = len(tokens) // BLOCK_TOKENS
    assert torch.equal(cache[first[:whole]], cache[second[:whole]])


def test_a_sequence_goes_on_where_its_blocks_were_copied_to(llama: Llama) -> None:
    tokens = tokens_of(101)
    cache = poisoned_cache(llama)
    source = np.arange(7, dtype=np.int32)
    llama.forward([Chunk(tokens[:100], 0, source)], cache)
    host = cache[:7].clone()
    assert host.is_contiguous()
    assert cache[:7].is_contiguous()  # a run of blocks is one piece of memory
    cache[:7] = float("nan")
    cache[40:47] = host
    logits = llama.forward([Chunk(tokens[100:], 100, source + 40)], cache)[0]
    assert torch.equal(logits, at_once(llama, tokens))


def test_only_the_slots_of_the_tokens_are_written(llama: Llama) -> None:
    cache, blocks = poisoned_cache(llama), table(0, 70)
    llama.forward([Chunk(tokens_of(70), 0, blocks)], cache)
    written = ~torch.isnan(cache).flatten(4).any(-1)  # [blocks, layers, 2, block_tokens]
    expected = torch.zeros_like(written)
    for position in range(70):
        expected[blocks[position // BLOCK_TOKENS], :, :, position % BLOCK_TOKENS] = True
    assert torch.equal(written, expected)


def test_what_others_left_in_unused_slots_does_not_leak(llama: Llama) -> None:
    tokens = tokens_of(30)
    cache, blocks = llama.new_cache(BLOCKS, BLOCK_TOKENS).fill_(1e30), table(0, 30)
    assert torch.equal(llama.forward([Chunk(tokens, 0, blocks)], cache)[0], at_once(llama, tokens))


def test_read_only_block_tables_longer_than_needed_are_welcome(llama: Llama) -> None:
    blocks = table(0, 200)
    blocks.flags.writeable = False
    tokens = tokens_of(20)
    logits = llama.forward([Chunk(tokens, 0, blocks)], poisoned_cache(llama))[0]
    assert torch.equal(logits, at_once(llama, tokens))


def test_bfloat16_ignores_chunks_and_company_as_well() -> None:
    half = Llama(CONFIG, to_bfloat16(Weights.random(CONFIG)))
    tokens = tokens_of(130)
    cache = poisoned_cache(half)
    assert cache.dtype == torch.bfloat16
    for start, stop in [(0, 7), (7, 66), (66, 129), (129, 130)]:
        company = Chunk(tokens_of(21, seed=1), 0, table(1, 21))
        mine = Chunk(tokens[start:stop], start, table(0, 130))
        logits = half.forward([company, mine], cache)[1]
        assert torch.equal(logits, at_once(half, tokens[:stop]))


def to_bfloat16(weights: Weights) -> Weights:
    def convert(part: Weights | LayerWeights) -> dict[str, torch.Tensor]:
        tensors = {k: v for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    layers = [replace(layer, **convert(layer)) for layer in weights.layers]
    return replace(weights, layers=layers, **convert(weights))


IDS: npt.NDArray[np.int32] = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "at least one chunk"),
        ([Chunk([], 3, IDS)], "needs tokens"),
        ([Chunk([1], -1, IDS)], "a position"),
        ([Chunk([1], 300, table(0, 301))], "context of 300"),
        ([Chunk([1], 64, IDS)], "need 5 blocks, the block table has 4"),
        ([Chunk([1], 0, IDS), Chunk([1] * 65, 0, IDS)], "allocate before the pass"),
    ],
)
def test_what_cannot_be_processed_is_refused_before_anything_is_written(
    llama: Llama, chunks: list[Chunk], message: str
) -> None:
    cache = poisoned_cache(llama)
    with pytest.raises(ConfigError, match=message):
        llama.forward(chunks, cache)
    assert torch.isnan(cache).all()


@pytest.mark.parametrize("shape", [(0, 16), (8, 0), (-1, 16)])
def test_a_cache_without_room_is_refused(llama: Llama, shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="blocks"):
        llama.new_cache(*shape)
