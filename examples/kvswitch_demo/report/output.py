"""The table, summary.json and the HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvswitch_demo.report import plots
from kvswitch_demo.report.compare import HEADLINES, Identity, times_better
from kvswitch_demo.report.drawing import PALETTE
from kvswitch_demo.report.provenance import Provenance
from kvswitch_demo.report.table import FOOTNOTES, HEADLINE_LABELS, ROWS, factor, title
from kvswitch_demo.report.timeline import timeline
from kvswitch_demo.report.transcripts import Transcript
from kvswitch_demo.results import RunResult, figures

__all__ = ["print_table", "summary", "write_html", "write_summary"]


def print_table(console: Console, runs: Sequence[RunResult], identity: Identity) -> None:
    """Print all figures, how many times better kvswitch is, and whether the tokens are the same."""
    every = [figures(run) for run in runs]
    table = Table("", "", *(title(run.mode) for run in runs), box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for _, rows in groupby(ROWS, key=lambda row: row.group):
        table.add_row()
        for row in rows:
            table.add_row(row.label, Text(row.unit, "dim"), *(row.text(f) for f in every))
    console.print(table)
    for note in _footnotes(every):
        console.print(Text(note, "dim"))
    if better := times_better(runs):
        ratios = Table("kvswitch is better", box=None, pad_edge=False)
        for mode in better:
            ratios.add_column(f"than {mode}", justify="right")
        for name in HEADLINES:
            ratios.add_row(HEADLINE_LABELS[name], *(factor(r[name]) for r in better.values()))
        console.print(Text(), ratios, Text(), sep="\n")
    console.print(Text(str(identity), "bold green" if identity.identical else "bold red"))


def summary(
    runs: Sequence[RunResult], identity: Identity, provenance: Provenance
) -> dict[str, Any]:
    """All of the table, and what it takes to judge and repeat it, as plain data."""
    result: dict[str, Any] = msgspec.to_builtins(provenance)
    result["modes"] = {run.mode: figures(run) for run in runs}
    result["times_better"] = times_better(runs)
    result["identity"] = {
        "identical": identity.identical,
        **msgspec.to_builtins(identity),
    }
    return result


def write_summary(
    path: Path, runs: Sequence[RunResult], identity: Identity, provenance: Provenance
) -> None:
    """Write `summary` as JSON; times in seconds, sizes in bytes."""
    text = json.dumps(summary(runs, identity, provenance), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_html(
    path: Path,
    runs: Sequence[RunResult],
    identity: Identity,
    provenance: Provenance,
    transcripts: Sequence[Transcript] = (),
) -> None:
    """Write the report: one page that needs nothing else, neither network nor scripts."""
    environment = Environment(
        loader=PackageLoader("kvswitch_demo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    every = {run.mode: figures(run) for run in runs}
    groups = [(name, list(rows)) for name, rows in groupby(ROWS, key=lambda row: row.group)]
    picture = timeline(runs)
    page = environment.get_template("report.html.j2").render(
        palette=PALETTE,
        modes=every,
        title=title,
        groups=groups,
        footnotes=_footnotes(list(every.values())),
        better=times_better(runs),
        headlines=HEADLINE_LABELS,
        factor=factor,
        identity=identity,
        provenance=provenance,
        meanings=_meanings(),
        volumes=Markup(plots.volumes(runs)),  # noqa: S704 - drawn here, from numbers
        distributions=Markup(plots.distributions(runs)),  # noqa: S704
        time_shares=Markup(plots.time_shares(runs)),  # noqa: S704
        timeline=picture and Markup(picture),  # noqa: S704
        transcripts=transcripts,
    )
    path.write_text(page, encoding="utf-8")


def _footnotes(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of `FOOTNOTES` whose sign is somewhere in the table."""
    cells = {row.text(f) for row in ROWS for f in every}
    return [note for note in FOOTNOTES if note.split()[0] in cells]


def _meanings() -> dict[str, str]:
    """What each setting means: the comments in the workload file."""
    text = (files("kvswitch_demo") / "workload.toml").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+) *= *[^#\n]*# *(.+)$", text, flags=re.MULTILINE))
