"""Runs set side by side: the same tokens everywhere, and how many times better kvswitch is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvswitch_demo.results import RunResult, figures

__all__ = ["HEADLINES", "Difference", "Identity", "compare_tokens", "times_better"]

HEADLINES = {
    "throughput_tokens_per_s": "higher",
    "ttft_p95": "lower",
    "tbt_p99": "lower",
    "stall": "lower",
    "inversion": "lower",
}
"""The figures that modes are judged by, and which way is better."""


class Difference(msgspec.Struct, frozen=True):
    """Where a mode's tokens first differ; None stands for a conversation that is shorter there.

    Attributes
    ----------
    conversations : int
        How many conversations differ.
    conversation, position : int
        The first of them, and the index of its first token that differs.
    expected, found : int or None
        The token there in the run compared with, and in this mode.
    """

    conversations: int
    conversation: int
    position: int
    expected: int | None
    found: int | None


class Identity(msgspec.Struct, frozen=True):
    """Whether every conversation came out the same in all modes.

    Attributes
    ----------
    against : str
        The mode that the others are compared with: the run without preemption if there is one.
    compared : tuple of str
        The others.
    conversations, tokens : int
        How many there are to compare in each run.
    differences : dict
        First difference of each mode that has one.
    """

    against: str
    compared: tuple[str, ...]
    conversations: int
    tokens: int
    differences: dict[str, Difference]

    @property
    def identical(self) -> bool:
        """Whether something was compared and nothing differs."""
        return bool(self.compared and self.tokens) and not self.differences

    def __str__(self) -> str:
        base = "the run without preemption" if self.against == "reference" else self.against
        if not (self.compared and self.tokens):
            return "Nothing to compare: it takes two runs with tokens."
        if self.identical:
            return (
                f"All {self.tokens:,} tokens of {self.conversations:,} conversations are identical "
                f"in {', '.join(self.compared)} and {base}."
            )
        return " ".join(
            f"{mode} differs from {base} in {d.conversations} of {self.conversations:,} "
            f"conversations, first in conversation {d.conversation} at position {d.position}: "
            f"token {_token(d.found)} instead of {_token(d.expected)}."
            for mode, d in self.differences.items()
        )


def compare_tokens(runs: Sequence[RunResult]) -> Identity:
    """Compare every conversation's tokens with those of the run without preemption.

    Parameters
    ----------
    runs : sequence of RunResult
        Compared with the one of mode "reference", or else with the first.
    """
    base = next((run for run in runs if run.mode == "reference"), runs[0])
    others = [run for run in runs if run is not base]
    differences = {run.mode: _first_difference(base, run) for run in others}
    return Identity(
        against=base.mode,
        compared=tuple(run.mode for run in others),
        conversations=len(base.tokens),
        tokens=sum(map(len, base.tokens.values())),
        differences={mode: found for mode, found in differences.items() if found},
    )


def times_better(runs: Sequence[RunResult]) -> dict[str, dict[str, float | None]]:
    """How many times better kvswitch is than the other ways of preempting.

    Returns
    -------
    dict
        By mode compared with, then by the name of each of `HEADLINES`: above 1 if kvswitch is
        better; None if one of the two has no such figure or it is zero.
    """
    by_mode = {run.mode: figures(run) for run in runs}
    ours = by_mode.get("kvswitch")
    if ours is None:
        return {}
    result: dict[str, dict[str, float | None]] = {}
    for mode in ("recompute", "per-block"):
        if theirs := by_mode.get(mode):
            result[mode] = {
                name: _factor(ours[name], theirs[name], better)
                for name, better in HEADLINES.items()
            }
    return result


def _factor(ours: float | None, theirs: float | None, better: str) -> float | None:
    if not ours or not theirs:
        return None
    return ours / theirs if better == "higher" else theirs / ours


def _first_difference(base: RunResult, run: RunResult) -> Difference | None:
    differing = sorted(
        conversation
        for conversation in base.tokens.keys() | run.tokens.keys()
        if base.tokens.get(conversation) != run.tokens.get(conversation)
    )
    if not differing:
        return None
    expected = base.tokens.get(differing[0], [])
    found = run.tokens.get(differing[0], [])
    pairs = enumerate(zip(expected, found, strict=False))
    shorter = min(len(expected), len(found))
    position = next((i for i, (a, b) in pairs if a != b), shorter)
    return Difference(
        conversations=len(differing),
        conversation=differing[0],
        position=position,
        expected=expected[position] if position < len(expected) else None,
        found=found[position] if position < len(found) else None,
    )


def _token(token: int | None) -> str:
    return "none" if token is None else str(token)
