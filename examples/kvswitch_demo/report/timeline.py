"""A priority epoch in each mode on one time axis, in the manner of the paper's figures 3 and 6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvswitch_demo.report.drawing import WIDTH, colour, styled, to_svg
from kvswitch_demo.report.table import title
from kvswitch_demo.results import IterationRecord, RunResult, TransferRecord

__all__ = ["timeline"]

_AFTER = 4  # iterations shown from the epoch on, of the mode where they take longest
_LANE = 0.72  # height of a bar; lanes are 1 apart
_ENGINE, _OUT, _IN = 0, -1, -2


@dataclass(frozen=True)
class _Moment:
    """The iteration at which an epoch begins in one mode's run."""

    run: RunResult
    index: int

    @property
    def iteration(self) -> IterationRecord:
        return self.run.iterations[self.index]

    @property
    def switches(self) -> int:
        return self.iteration.preempted + self.iteration.resumed

    def at(self, time: float) -> float:
        """A time of the run as seconds since the epoch began."""
        return time - self.iteration.begin

    @property
    def own_transfers(self) -> list[TransferRecord]:
        """Those that this iteration started."""
        begin = self.iteration.begin
        later = self.run.iterations[self.index + 1 :][:1]
        end = later[0].begin if later else self.run.seconds
        return [t for t in self.run.transfers if begin <= t.started < end]


def timeline(runs: Sequence[RunResult]) -> str | None:
    """Draw the same kind of moment in every mode: an epoch with equally many switches.

    Of several such the one with the median wait is taken. On the left a few iterations, on the
    right the switch itself.

    Returns
    -------
    str or None
        An ``<svg>`` element; None if there is no epoch with a switch in any mode.
    """
    moments = _comparable([run for run in runs if run.mode != "reference"])
    if not moments:
        return None
    with styled():
        lanes = [3 if moment.run.transfers else 1 for moment in moments]
        figure = Figure((WIDTH, 1.35 + 0.42 * sum(lanes) + 0.3 * len(lanes)), layout="constrained")
        panels = figure.subplots(
            len(moments), 2, squeeze=False, sharex="col",
            gridspec_kw={"height_ratios": [n + 0.7 for n in lanes], "width_ratios": [1.45, 1]},
        )  # fmt: skip
        wide, close = _spans(moments)
        for moment, (left, right), n in zip(moments, panels, lanes, strict=True):
            _lanes(left, moment, wide, n)
            _lanes(right, moment, close, n)
            _name_batches(left, moment, wide)
            _count_copies(right, moment)
            left.axvspan(*close, color=colour("rule"), alpha=0.5, linewidth=0, zorder=0)
            left.set_title(_caption(moment), color=colour(moment.run.mode))
            right.set_yticklabels([])
        panels[0, 1].set_title("the shaded part enlarged", color=colour("muted"), weight="normal")
        panels[-1, 0].set_xlabel("seconds since the priority epoch")
        panels[-1, 1].set_xlabel("milliseconds since the priority epoch")
        panels[-1, 1].xaxis.set_major_formatter(lambda x, _: f"{1e3 * x:g}")
        figure.legend(
            handles=_legend(moments), loc="outside upper center", ncols=5, frameon=False,
            handlelength=1.8,
        )  # fmt: skip
        return to_svg(figure, "timeline", "Timeline of a few iterations in each mode")


def _comparable(runs: Sequence[RunResult]) -> list[_Moment]:
    """One epoch of each run, with as many switches as all of them have somewhere."""
    candidates = []
    for run in runs:
        pairs = enumerate(zip(run.iterations, run.iterations[1:], strict=False), 1)
        epochs = [_Moment(run, i) for i, (a, b) in pairs if a.epoch != b.epoch]
        candidates.append([moment for moment in epochs if moment.switches])
    candidates = [moments for moments in candidates if moments]
    if not candidates:
        return []
    shared = min(max(moment.switches for moment in moments) for moments in candidates)
    chosen = []
    for moments in candidates:
        nearest = min(abs(moment.switches - shared) for moment in moments)
        equal = [moment for moment in moments if abs(moment.switches - shared) == nearest]
        equal.sort(key=lambda moment: moment.iteration.ready - moment.iteration.begin)
        chosen.append(equal[len(equal) // 2])
    return chosen


def _spans(moments: Sequence[_Moment]) -> tuple[tuple[float, float], tuple[float, float]]:
    """From when to when both columns go, in seconds since the epoch."""
    before, after, switch = 0.0, 0.0, 0.0
    for moment in moments:
        around = moment.run.iterations[max(0, moment.index - 1) : moment.index + _AFTER]
        before = min(before, moment.at(around[0].begin))
        after = max(after, moment.at(around[-1].end))
        copied = [moment.at(transfer.ended) for transfer in moment.own_transfers]
        switch = max(switch, moment.at(moment.iteration.ready), *copied, 1e-4)
    return (before, after), (-0.06 * switch, 1.12 * switch)


def _lanes(axes: Axes, moment: _Moment, span: tuple[float, float], lanes: int) -> None:
    """What the engine's thread and both directions of the copy engine do within `span`."""
    run, mode = moment.run, colour(moment.run.mode)
    axes.set(xlim=span, ylim=(0.5 - lanes, 0.62))
    for i in run.iterations:
        begin, ready, end = moment.at(i.begin), moment.at(i.ready), moment.at(i.end)
        if end < span[0] or begin > span[1]:
            continue
        _bar(axes, _ENGINE, (begin, ready - i.stall), colour("planning"))
        _bar(axes, _ENGINE, (ready - i.stall, ready), colour("waiting"))
        _bar(axes, _ENGINE, (ready, end), colour("forward"))
        if i.recomputed:
            _bar(axes, _ENGINE, (ready, end), mode, share=_recomputed(i))
    for t in run.transfers:
        begin, end = moment.at(t.started), moment.at(t.ended)
        if end >= span[0] and begin <= span[1]:
            _bar(axes, _OUT if t.out else _IN, (begin, end), mode)
    axes.axvline(0, color=colour("ink"), linewidth=1, linestyle=(0, (3, 2)))
    axes.plot(0, 0.62, marker="v", color=colour("ink"), markersize=6, clip_on=False)
    names = ("engine thread", "copies out", "copies in")[:lanes]
    axes.set_yticks([-i for i in range(lanes)], names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _bar(
    axes: Axes, lane: int, span: tuple[float, float], fill: str, *, share: float = 1.0
) -> None:
    """A bar in a lane; `share` of its height, from below."""
    begin, end = span
    left, right = axes.get_xlim()
    wide = end - begin > 0.01 * (right - left)  # else an edge would hide it
    axes.bar(
        begin, share * _LANE, end - begin, lane - _LANE / 2, align="edge", color=fill,
        edgecolor=colour("paper") if wide else fill, linewidth=0.5,
    )  # fmt: skip


def _recomputed(iteration: IterationRecord) -> float:
    """Share of an iteration's tokens that had been computed before."""
    computed = iteration.prefilled + iteration.decoding
    return iteration.recomputed / max(1, iteration.recomputed, computed)


def _name_batches(axes: Axes, moment: _Moment, span: tuple[float, float]) -> None:
    """Write into the forwards how many sequences decode and how many tokens are prefilled."""
    for i in moment.run.iterations:
        begin, end = max(moment.at(i.ready), span[0]), min(moment.at(i.end), span[1])
        label = f"{i.decoding} + {i.prefilled}" if i.prefilled else str(i.decoding)
        if end - begin > 0.012 * len(label) * (span[1] - span[0]):
            share = _recomputed(i)
            below, ink = (share > 0.5), colour("paper" if share > 0.5 else "ink")
            middle = _LANE * (share if below else 1 + share) / 2 - _LANE / 2
            axes.text(
                (begin + end) / 2, _ENGINE + middle, label, fontsize=7.5, color=ink,
                ha="center", va="center_baseline",
            )  # fmt: skip


def _count_copies(axes: Axes, moment: _Moment) -> None:
    """Behind the lanes of the epoch's own copies: how many blocks in how many copies."""
    for lane, out in ((_OUT, True), (_IN, False)):
        own = [t for t in moment.own_transfers if t.out is out]
        if not own:
            continue
        blocks, copies = sum(t.blocks for t in own), sum(t.copies for t in own)
        label = f"{blocks:,} blocks\n{copies:,} " + ("copy" if copies == 1 else "copies")
        axes.annotate(
            label, (1, lane), (5, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip


def _caption(moment: _Moment) -> str:
    i = moment.iteration
    return f"{title(moment.run.mode)}: {i.preempted} out, {i.resumed} in"


def _legend(moments: Sequence[_Moment]) -> list[Artist]:
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            color=colour("ink"),
            linewidth=1,
            linestyle=(0, (3, 2)),
            marker="v",
            markevery=[0],
            label="priorities change",
        ),
        Patch(color=colour("planning"), label="scheduling, dispatch"),
        Patch(color=colour("waiting"), label="waiting for copies"),
        Patch(color=colour("forward"), label="forward"),
    ]
    if any(moment.run.mode == "recompute" for moment in moments):
        recomputed = "of its tokens, those recomputed"
        handles.append(Patch(color=colour("recompute"), label=recomputed))
    return handles
