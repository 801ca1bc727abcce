"""Llama in plain PyTorch, with a paged KV cache and results that ignore the company they keep.

The cache is one tensor, block dimension first, so that all layers of a block lie together and a
run of blocks is one contiguous piece of memory, moved by one copy:

    cache [num_blocks, layers, 2, block_tokens, kv_heads, head_dim]

             block 7                         block 8
    ... | layer 0     | layer 1     | ... | layer 0     | ...
        | K ... V ... | K ... V ... |     | K ... V ... |

One pass takes prefill chunks and single decode tokens together. A token's logits depend on its
prefix alone: bit for bit the same whatever else is in the batch, however its prompt was cut in
chunks, and whether it was prefilled, decoded or recomputed. That is what lets an engine preempt
without changing a single answer. Three rules make it so (on the CPU, in float32):

* Matrix products never see only a few rows, for which libraries have other kernels that add up
  in another order. Above that, a row's result does not depend on the number of rows.
* Positions are cut in tiles of 64. Queries of a tile see the keys from 0 to the end of *their*
  tile, so that a token's attention has the same shape at any time.
* What lies beyond a sequence's tokens is zeroed when it is gathered, not only masked: memory
  that nobody has written may hold NaN, and 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

from kvswitch.errors import ConfigError
from kvswitch.messages import BlockIds

__all__ = [
    "Chunk",
    "Layer",
    "LayerWeights",
    "Llama",
    "LlamaConfig",
    "Weights",
    "check_chunk",
    "norm",
]

TILE = 64  # positions whose attention spans the same keys
LINEAR_ROWS = 8  # rows of a linear layer's input come in multiples of this
ATTENTION_ROWS = 4  # fewest queries multiplied with a sequence's keys


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model.

    Attributes
    ----------
    context : int
        Longest sequence, in tokens.
    rope_theta : float
        Base of the rotary embedding's frequencies.
    norm_eps : float
    """

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; matrices are [out, in].

    The heads of `qkv` are those of Q, then of K, then of V. Rotary embedding turns neighbours
    (2i, 2i + 1) of a head, which is how GGUF files order the rows of Q and K.
    """

    attention_norm: Tensor
    qkv: Tensor  # [(heads + 2 kv_heads) head_dim, hidden]
    attention_output: Tensor  # [hidden, heads head_dim]
    ffn_norm: Tensor
    gate_up: Tensor  # [2 ffn, hidden]
    down: Tensor  # [hidden, ffn]


@dataclass(frozen=True)
class Weights:
    """Weights of a model; without an `output` matrix of its own it is the embedding's."""

    embedding: Tensor  # [vocab, hidden]
    layers: Sequence[LayerWeights]
    output_norm: Tensor
    output: Tensor | None = None

    @classmethod
    def random(cls, config: LlamaConfig, seed: int = 0) -> Weights:
        """Draw float32 weights that say nothing, for trying things out on a small model."""
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            values: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
            return values

        def scale() -> Tensor:
            values: Tensor = 1 + 0.1 * torch.randn(config.hidden, generator=generator)
            return values

        attended = config.heads * config.head_dim
        return cls(
            embedding=matrix(config.vocab, config.hidden),
            layers=[
                LayerWeights(
                    attention_norm=scale(),
                    qkv=matrix(attended + 2 * config.kv_heads * config.head_dim, config.hidden),
                    attention_output=matrix(config.hidden, attended),
                    ffn_norm=scale(),
                    gate_up=matrix(2 * config.ffn, config.hidden),
                    down=matrix(config.hidden, config.ffn),
                )
                for _ in range(config.layers)
            ],
            output_norm=scale(),
            output=matrix(config.vocab, config.hidden),
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence to be processed in this pass.

    Attributes
    ----------
    tokens : sequence of int
        Token ids: a piece of a prompt, or the token decoded last.
    start : int
        Position of the first of them; the cache holds what comes before.
    blocks : BlockIds
        The sequence's block table, with room for these tokens too.
    """

    tokens: Sequence[int]
    start: int
    blocks: BlockIds

    @property
    def stop(self) -> int:
        """Number of the sequence's tokens in the cache once the chunk is processed."""
        return self.start + len(self.tokens)


class Llama:
    """A Llama model that keeps its KV cache in blocks somebody else manages.

    Parameters
    ----------
    config : LlamaConfig
    weights : Weights
        All on one device, in one floating-point type.

    Attributes
    ----------
    config : LlamaConfig
    dtype, device
        Those of the weights, and of the caches that go with them.
    """

    def __init__(self, config: LlamaConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.embedding = weights.embedding
        self.layers = [Layer(config, layer) for layer in weights.layers]
        self.output_norm = weights.output_norm
        self.output = _linear(weights.embedding if weights.output is None else weights.output)
        self.rotation = _rotations(config).to(self.device)
        self._mask = _causal_mask(config).to(self.device, self.dtype)

    def new_cache(self, num_blocks: int, block_tokens: int) -> Tensor:
        """Make a KV cache of `num_blocks` blocks of `block_tokens` tokens, block dimension first.

        Returns
        -------
        Tensor
            [num_blocks, layers, 2, block_tokens, kv_heads, head_dim], contiguous; index 0 of the
            third dimension is K, 1 is V.
        """
        if num_blocks < 1 or block_tokens < 1:
            raise ConfigError(
                f"a cache needs blocks and tokens in them, got {num_blocks} x {block_tokens}"
            )
        heads = self.config.kv_heads, self.config.head_dim
        shape = num_blocks, self.config.layers, 2, block_tokens, *heads
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(self, chunks: Sequence[Chunk], cache: Tensor) -> Tensor:
        """Process the chunks' tokens, write their K and V to the cache, predict what comes next.

        What does not need the cache can be done beforehand: it is ``prepare(chunks, cache)()``.

        Parameters
        ----------
        chunks : sequence of Chunk
            At most one per sequence.
        cache : Tensor
            From `new_cache`.

        Returns
        -------
        Tensor
            Logits after the last token of each chunk, float32 [len(chunks), vocab].

        Raises
        ------
        ConfigError
            There are no chunks, or one of them is empty, exceeds the context, or has a block table
            too short for it. The cache is as it was.
        """
        return self.prepare(chunks, cache)()

    @torch.inference_mode()
    def prepare(self, chunks: Sequence[Chunk], cache: Tensor) -> Callable[[], Tensor]:
        """Make ready for `forward`, without looking into the cache; calling the result goes on."""
        return partial(self._run, _Batch(self, chunks, cache), cache)

    @torch.inference_mode()
    def _run(self, batch: _Batch, cache: Tensor) -> Tensor:
        x = F.embedding(batch.tokens, self.embedding)
        for layer, pages in zip(self.layers, cache.unbind(1), strict=True):
            x = x + layer.attention(x, pages, batch)
            x = x + layer.ffn(x)
        logits = self.output(norm(x[batch.last], self.output_norm, self.config.norm_eps))
        return logits[: len(batch.spans)].float()


class Layer:
    """One layer; `x` is [tokens, hidden] over all tokens of the batch."""

    def __init__(self, config: LlamaConfig, weights: LayerWeights) -> None:
        self._config = config
        self._attention_norm, self._ffn_norm = weights.attention_norm, weights.ffn_norm
        self._qkv = _linear(weights.qkv)
        self.attention_output = _linear(weights.attention_output)
        self._gate_up = _linear(weights.gate_up)
        self._down = _linear(weights.down)

    def attention(self, x: Tensor, pages: Tensor, batch: _Batch) -> Tensor:
        """Attend to `pages`, this layer's part of the cache: [num_blocks, 2, block_tokens, ...]."""
        config = self._config
        queries, keys, values = self.project(x, batch.rotation)

        block, slot = batch.slots
        written = len(block)  # the rest is padding
        pages[block, :, slot] = torch.stack((keys[:written], values[:written]), 1)

        group = config.heads // config.kv_heads
        batch.queries.copy_(queries.view(len(x), config.kv_heads, group, -1).transpose(0, 1))
        for span in batch.spans:
            torch.index_select(pages, 0, span.blocks, out=span.gathered)
            span.beyond.zero_()
            for tile in span.tiles:
                scores = torch.baddbmm(
                    tile.mask, tile.queries, tile.keys, alpha=config.head_dim**-0.5
                )
                weights = torch.softmax(scores, -1, dtype=torch.float32).type_as(scores)
                result = torch.bmm(weights, tile.values)
                tile.result.copy_(result[:, : tile.rows].view_as(tile.result))
        return self.attention_output(batch.attended.flatten(1))

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, rotated: [tokens, heads, head_dim] each."""
        config = self._config
        qkv = self._qkv(norm(x, self._attention_norm, config.norm_eps))
        qkv = qkv.view(len(x), -1, config.head_dim)
        rotated = _rotate(qkv[:, : -config.kv_heads], rotation)
        return (
            rotated[:, : config.heads],
            rotated[:, config.heads :],
            qkv[:, -config.kv_heads :],
        )

    def ffn(self, x: Tensor) -> Tensor:
        """The feed-forward part."""
        gate, up = self._gate_up(norm(x, self._ffn_norm, self._config.norm_eps)).chunk(2, -1)
        return self._down(F.silu(gate).mul_(up))


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries of one chunk that lie in one tile of positions, and what they attend to.

    All tensors are views of the batch's working memory. A row is one query head of one token;
    the heads that share a KV head are multiplied with its keys together.
    """

    queries: Tensor  # [kv_heads, max(rows, ATTENTION_ROWS), head_dim]
    mask: Tensor  # [max(rows, ATTENTION_ROWS), keys]
    keys: Tensor  # [kv_heads, head_dim, keys]
    values: Tensor  # [kv_heads, keys, head_dim]
    result: Tensor  # [kv_heads, tokens, heads per KV head, head_dim]
    rows: int


@dataclass(frozen=True, slots=True)
class _Span:
    """One chunk: where its sequence's K and V lie, and where they are gathered."""

    blocks: Tensor  # ids
    gathered: Tensor  # [blocks, 2, block_tokens, kv_heads, head_dim]
    beyond: Tensor  # behind the sequence's last token, up to the end of its tile
    tiles: Sequence[_Tile]


class _Batch:
    """All that a pass must know of its chunks: worked out once, used in every layer.

    Attributes
    ----------
    tokens : Tensor
        Token ids of all chunks, padded to a multiple of `LINEAR_ROWS`.
    rotation : Tensor
        Their rotary embedding.
    slots : tuple of Tensor
        Block, and place in the block, of each token; padding excluded.
    last : Tensor
        Row of each chunk's last token, padded like `tokens`.
    queries, attended : Tensor
        What attention reads and writes: [kv_heads, tokens, heads per KV head, head_dim] and
        [tokens, kv_heads, heads per KV head, head_dim].
    spans : list of _Span
        One per chunk.
    """

    def __init__(self, model: Llama, chunks: Sequence[Chunk], cache: Tensor) -> None:
        block_tokens = cache.shape[3]
        if not chunks:
            raise ConfigError("a pass needs at least one chunk")
        for chunk in chunks:
            check_chunk(chunk, model.config, block_tokens)

        def tensor(pieces: list[Any], *, pad: bool = False) -> Tensor:
            array = np.concatenate(pieces, dtype=np.int64)
            if pad:
                array = np.pad(array, (0, -len(array) % LINEAR_ROWS))
            return torch.from_numpy(array).to(model.device)

        positions = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
        written = [c.blocks[p // block_tokens] for c, p in zip(chunks, positions, strict=True)]
        ends = list(accumulate(len(chunk.tokens) for chunk in chunks))
        self.tokens = tensor([chunk.tokens for chunk in chunks], pad=True)
        self.rotation = model.rotation[tensor(positions, pad=True)]
        self.slots = tensor(written), tensor([p % block_tokens for p in positions])
        self.last = tensor([[end - 1 for end in ends]], pad=True)

        kv_heads, group = model.config.kv_heads, model.config.heads // model.config.kv_heads
        rows = len(self.tokens) * group
        # With spare rows behind: a tile of too few queries takes along those that follow it.
        queries = cache.new_zeros(kv_heads, rows + ATTENTION_ROWS, model.config.head_dim)
        self.queries = queries[:, :rows].view(kv_heads, -1, group, model.config.head_dim)
        self.attended = cache.new_zeros(len(self.tokens), kv_heads, group, model.config.head_dim)

        # All sequences are gathered, one after the other, to one place that stays in the L2 cache.
        room = max(chunk.stop for chunk in chunks) + max(TILE, block_tokens)
        gathered = cache.new_empty(2, room, *cache.shape[4:])

        def tile(start: int, stop: int, row: int) -> _Tile:
            keys, first, count = _tile_end(start), row * group, (stop - start) * group
            taken = max(count, ATTENTION_ROWS)
            return _Tile(
                queries=queries[:, first : first + taken],
                mask=model._mask[start % TILE * group :][:taken, -keys:],
                keys=gathered[0, :keys].permute(1, 2, 0),
                values=gathered[1, :keys].transpose(0, 1),
                result=self.attended[row : row + stop - start].transpose(0, 1),
                rows=count,
            )

        self.spans: list[_Span] = []
        for chunk, end in zip(chunks, ends, strict=True):
            blocks = tensor([chunk.blocks[: -(-chunk.stop // block_tokens)]])
            place = gathered[:, : len(blocks) * block_tokens]
            self.spans.append(
                _Span(
                    blocks=blocks,
                    gathered=place.view(2, len(blocks), *cache.shape[3:]).transpose(0, 1),
                    beyond=gathered[:, chunk.stop : _tile_end(chunk.stop - 1)],
                    tiles=[
                        tile(start, stop, end - chunk.stop + start) for start, stop in _tiles(chunk)
                    ],
                )
            )


def check_chunk(chunk: Chunk, config: LlamaConfig, block_tokens: int) -> None:
    """ConfigError if a chunk cannot be processed."""
    if not chunk.tokens or chunk.start < 0:
        raise ConfigError(
            f"a chunk needs tokens and a position, got {len(chunk.tokens)} tokens at {chunk.start}"
        )
    if chunk.stop > config.context:
        raise ConfigError(
            f"{chunk.stop} tokens exceed the model's context of {config.context}: end the sequence"
        )
    if chunk.stop > len(chunk.blocks) * block_tokens:
        raise ConfigError(
            f"{chunk.stop} tokens need {-(-chunk.stop // block_tokens)} blocks, "
            f"the block table has {len(chunk.blocks)}: allocate before the pass"
        )


def _tile_end(position: int) -> int:
    """End of the tile that `position` lies in."""
    return (position // TILE + 1) * TILE


def _tiles(chunk: Chunk) -> Iterator[tuple[int, int]]:
    """Cut a chunk's positions where tiles end."""
    start = chunk.start
    while start < chunk.stop:
        stop = min(_tile_end(start), chunk.stop)
        yield start, stop
        start = stop


def _causal_mask(config: LlamaConfig) -> Tensor:
    """What to add to a tile's scores: [tile positions x heads per KV head, context].

    Right-aligned: the last `TILE` columns are the tile itself, those before it are all seen.
    """
    group = config.heads // config.kv_heads
    mask = torch.zeros(TILE * group + ATTENTION_ROWS, _tile_end(config.context - 1))
    unseen = torch.full((TILE, TILE), -math.inf).triu(1)
    mask[: TILE * group, -TILE:] = unseen.repeat_interleave(group, 0)
    return mask


def _rotations(config: LlamaConfig) -> Tensor:
    """Rotary embedding of every position, as complex numbers [context, 1, head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    positions = torch.arange(config.context, dtype=torch.float64)
    angles = torch.outer(positions, config.rope_theta**-exponents)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).unsqueeze(1)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbours of a head, taken as a complex number."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the function x -> x W^T, for inputs of a multiple of `LINEAR_ROWS` rows.

    On x86 PyTorch's float32 product goes to MKL. oneDNN, which PyTorch ships as well and its
    compiler uses, is about twice as fast here with weights packed beforehand.
    """
    x86 = weight.device.type == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability()
    if x86 and weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, LINEAR_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return partial(F.linear, weight=weight)
