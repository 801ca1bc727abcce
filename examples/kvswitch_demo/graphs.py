"""The model on a GPU: every pass replays one CUDA graph.

A graph has fixed shapes, so a pass always has the same number of rows. A row is one token of some
sequence, with its position and its sequence's block table; what has fewer tokens is filled up with
copies of the last row, which write the same bytes to the same place again, and what has more takes
several passes. Prompts and decoded tokens, of one sequence or many, are all just rows:

    row     token   position   block table           every layer: write K and V of all rows, then
    0       1041    312        7 8 9 30 . . .        each row attends to positions 0 .. its own
    1       88      0          12 13 . . .
    2       19      1          12 13 . . .           <- the same prompt's next token

Since every row goes through the same kernels with the same shapes whatever is in the others, its
logits do not depend on the company it keeps, nor on whether it is computed or recomputed. So
preemption changes no answer here either (see model.py for how that is had on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

from kvswitch.errors import ConfigError
from kvswitch_demo.model import Chunk, Llama, LlamaConfig, Weights, check_chunk, norm

__all__ = ["GraphLlama"]


class GraphLlama(Llama):
    """A `Llama` whose passes are CUDA graphs; on a CPU the same operations run one by one.

    Parameters
    ----------
    config : LlamaConfig
    weights : Weights
    rows : int
        Tokens in a pass.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, *, rows: int = 32) -> None:
        super().__init__(config, weights)
        self._rows = rows
        self._pass: _Pass | None = None

    @torch.inference_mode()
    def prepare(self, chunks: Sequence[Chunk], cache: Tensor) -> Callable[[], Tensor]:
        """See `Llama.prepare`."""
        if not chunks:
            raise ConfigError("a pass needs at least one chunk")
        for chunk in chunks:
            check_chunk(chunk, self.config, cache.shape[3])
        if self._pass is None or self._pass.cache is not cache:
            self._pass = None  # its memory goes first
            self._pass = _Pass(self, cache, self._rows)
        return partial(self._pass.run, chunks)


class _Pass:
    """The operations of a pass over `rows` tokens, on one cache, and their inputs."""

    def __init__(self, model: GraphLlama, cache: Tensor, rows: int) -> None:
        self.cache = cache
        self._model = model
        self._rows = rows
        self._block_tokens = cache.shape[3]
        self._width = -(-model.config.context // self._block_tokens)  # blocks in a table
        # One tensor for all inputs, so that they go to the device in one copy: token, position,
        # block and slot written to, block table.
        shape = rows, 4 + self._width
        cuda = model.device.type == "cuda"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=cuda)
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=model.device)
        self._places = torch.arange(self._width * self._block_tokens, device=model.device)
        self._graph: Any = None
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits behind each chunk, float32 [chunks, vocab]."""
        logits = torch.empty(len(chunks), self._model.config.vocab, device=self._model.device)
        tokens = [(i, k) for i, chunk in enumerate(chunks) for k in range(len(chunk.tokens))]
        for first in range(0, len(tokens), self._rows):
            rows = tokens[first : first + self._rows]
            self._fill([(chunks[i], k) for i, k in rows])
            result = self._replay()
            for row, (i, k) in enumerate(rows):
                if k == len(chunks[i].tokens) - 1:
                    logits[i] = result[row]
        return logits

    def _fill(self, rows: Sequence[tuple[Chunk, int]]) -> None:
        """Send the inputs of a pass to the device."""
        if self._graph is not None:
            torch.cuda.current_stream(self._model.device).synchronize()  # the last ones were read
        array = self._host.numpy()
        for row, (chunk, k) in zip(array, rows, strict=False):
            position, held = chunk.start + k, min(len(chunk.blocks), self._width)
            block, slot = divmod(position, self._block_tokens)
            row[:4] = chunk.tokens[k], position, chunk.blocks[block], slot
            row[4 : 4 + held] = chunk.blocks[:held]
            row[4 + held :] = chunk.blocks[0]  # not attended to, but it must be a block
        array[len(rows) :] = array[len(rows) - 1]
        self._inputs.copy_(self._host, non_blocking=True)

    def _replay(self) -> Tensor:
        """Run the pass on its inputs."""
        if self._model.device.type != "cuda":
            return self._compute()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        """Record the operations; running them before, as must be done, writes nothing else."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._compute()
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._compute()

    def _compute(self) -> Tensor:
        model, config = self._model, self._model.config
        token, position, block, slot = self._inputs[:, :4].unbind(1)
        table = self._inputs[:, 4:]
        rotation = model.rotation[position]
        unseen = self._places > position[:, None]  # [rows, places]
        heads = config.kv_heads, config.heads // config.kv_heads
        x = F.embedding(token, model.embedding)
        for layer, pages in zip(model.layers, self.cache.unbind(1), strict=True):
            queries, keys, values = layer.project(x, rotation)
            pages[block, :, slot] = torch.stack((keys, values), 1)
            held = pages[table]  # [rows, blocks, 2, block tokens, KV heads, head]
            k, v = (held[:, :, i].flatten(1, 2).transpose(1, 2) for i in range(2))
            # What nobody has written may be NaN, and 0 * NaN is NaN: zeroed, not only masked.
            v = v.masked_fill(unseen[:, None, :, None], 0)
            queries = queries.view(self._rows, *heads, config.head_dim)
            scores = torch.matmul(queries, k.transpose(2, 3)) * config.head_dim**-0.5
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
            weights = torch.softmax(scores, -1, dtype=torch.float32).type_as(scores)
            x = x + layer.attention_output(torch.matmul(weights, v).flatten(1))
            x = x + layer.ffn(x)
        return model.output(norm(x, model.output_norm, config.norm_eps)).float()
