"""How long an iteration of the engine takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kvswitch.sim.profiles import Engine, Gpu, Model

__all__ = ["LinearSteps", "RooflineSteps", "StepModel"]


class StepModel(Protocol):
    """Predicts the duration of a forward."""

    def seconds(self, decoding: int, context: int, prefills: Iterable[tuple[int, int]]) -> float:
        """Seconds of an iteration.

        Parameters
        ----------
        decoding : int
            Sequences that make one token each.
        context : int
            Tokens that these attend to, in all.
        prefills : iterable of (int, int)
            Chunks of prompts: tokens to compute, and tokens before them.
        """
        ...

    def traffic_seconds(self, nbytes: float) -> float:
        """Seconds of memory bandwidth that `nbytes` to or from the host take from an iteration."""
        ...


class RooflineSteps:
    """Compute or memory bandwidth, whichever is the limit, and a constant overhead.

    Matrices are read once an iteration, and multiplied with every token, the output matrix with one
    token of each sequence: the larger of both times counts. Attention of decoding sequences reads
    their KV cache; that of a prompt's chunk is computed over all tokens before it, whose KV cache
    is read once (prefix-aware prefill).
    """

    def __init__(self, gpu: Gpu, model: Model, engine: Engine) -> None:
        bandwidth = gpu.bandwidth * 1e9 * engine.bandwidth_utilisation
        flops = gpu.flops * 1e12 * engine.flops_utilisation
        self._overhead = engine.step_overhead * 1e-3
        self._weights = 2 * (model.layer_parameters + model.output_parameters) / bandwidth
        self._token = 2 * model.layer_parameters / flops
        self._output = 2 * model.output_parameters / flops
        self._kv_read = model.kv_bytes / bandwidth
        self._attention = model.attention_flops / flops
        self._byte = 1 / bandwidth

    def seconds(self, decoding: int, context: int, prefills: Iterable[tuple[int, int]]) -> float:
        """Predict; see `StepModel`."""
        tokens = sequences = decoding
        attention = context * self._kv_read
        for chunk, before in prefills:
            tokens += chunk
            sequences += 1
            pairs = chunk * (before + (chunk + 1) / 2)
            attention += max(pairs * self._attention, (before + chunk) * self._kv_read)
        compute = tokens * self._token + sequences * self._output
        return self._overhead + max(self._weights, compute) + attention

    def traffic_seconds(self, nbytes: float) -> float:
        """Predict; see `StepModel`."""
        return nbytes * self._byte


class LinearSteps:
    """A constant for an iteration, and one for each prompt token in it, in seconds."""

    def __init__(self, base: float, per_prefilled: float) -> None:
        self._base = base
        self._per_prefilled = per_prefilled

    def seconds(self, decoding: int, context: int, prefills: Iterable[tuple[int, int]]) -> float:
        """Predict; see `StepModel`."""
        return self._base + self._per_prefilled * sum(tokens for tokens, _ in prefills)

    def traffic_seconds(self, nbytes: float) -> float:
        """Copies cost iterations nothing."""
        return 0.0
