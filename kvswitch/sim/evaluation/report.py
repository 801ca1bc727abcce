"""The report: JSON with all numbers, one HTML page, and the page for the docs."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from kvswitch.errors import ConfigError
from kvswitch.sim.evaluation.drawing import draw
from kvswitch.sim.evaluation.figure import Figure, Row, Table
from kvswitch.sim.evaluation.jobs import code_digest
from kvswitch.sim.profiles import load_profiles

__all__ = ["Provenance", "write_docs", "write_report"]

_NOTES: dict[str, list[str]] = msgspec.toml.decode(
    (files("kvswitch.sim.evaluation") / "notes.toml").read_bytes()
)
"""Why figures differ from the paper's: of the results in docs/evaluation.md, at full size."""


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What the results are of."""

    date: str
    command: str
    scale: str
    missing: int
    jobs: int
    machine: str
    code: str
    versions: dict[str, str]

    @classmethod
    def here(cls, *, command: str, scale: str, missing: int, jobs: int) -> Provenance:
        """Of this machine, now."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            scale=scale,
            missing=missing,
            jobs=jobs,
            machine=f"{_processor()}, {platform.system()} {platform.release()}",
            code=code_digest()[:12],
            versions={
                "kvswitch": version("kvswitch"),
                "numpy": version("numpy"),
                "python": platform.python_version(),
            },
        )


def _processor() -> str:
    """The CPU's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _notes(figure: Figure, provenance: Provenance) -> list[str]:
    return _NOTES.get(figure.id, []) if provenance.scale == "full" else []


def write_report(directory: Path, figures: Sequence[Figure], provenance: Provenance) -> None:
    """Write evaluation.json, report.html and evaluation.md.

    Raises
    ------
    ConfigError
        The directory cannot be written.
    """
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            figures=[(f, draw(f.plots), _notes(f, provenance)) for f in figures],
            counts=_counts(figures),
            constants=_constants(),
            provenance=provenance,
        )
    )
    _write(directory / "evaluation.json", _json(figures, provenance))
    _write(directory / "report.html", page)
    _write(directory / "evaluation.md", _markdown(figures, provenance))


def write_docs(directory: Path, figures: Sequence[Figure], provenance: Provenance) -> None:
    """Write evaluation.md and benchmarks/evaluation.json for the project's docs."""
    _write(directory / "evaluation.md", _markdown(figures, provenance))
    _write(directory / "benchmarks" / "evaluation.json", _json(figures, provenance))


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from error


def _json(figures: Sequence[Figure], provenance: Provenance) -> str:
    content = {
        **msgspec.to_builtins(provenance),
        "constants": msgspec.to_builtins(load_profiles()),
        "figures": {figure.id: figure.as_dict() for figure in figures},
    }
    return json.dumps(_rounded(content), indent=1) + "\n"


def _rounded(value: Any) -> Any:
    """Numbers to five digits: more would say nothing."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def _summary(figures: Sequence[Figure]) -> list[tuple[Figure, Row]]:
    return [(figure, row) for figure in figures for row in figure.rows if row.aim is not None]


def _counts(figures: Sequence[Figure]) -> Counter[str]:
    return Counter(row.verdict for _, row in _summary(figures))


def _constants() -> list[tuple[str, str, str, str]]:
    """(profile, constant, value, source) of everything that the results rest on."""
    profiles = msgspec.to_builtins(load_profiles())
    rows = []
    for group in ("gpu", "link", "model"):
        for name, profile in profiles[group].items():
            rows += _sourced(f"{group} {name}", profile)
    for group in ("engine", "setting"):
        rows += _sourced(group, profiles[group])
    return rows


def _sourced(where: str, profile: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    sources = profile["sources"]
    return [
        (where, name, str(value), sources.get(name, sources.get("all", "")))
        for name, value in profile.items()
        if name not in ("sources", "name")
    ]


# -- texts --------------------------------------------------------------------------------------


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    if 0 < abs(value) < 0.1:
        return f"{value:.2g}{unit}"
    return f"{value:,.{digits}f}{unit}"


def _spread(row: Row) -> str:
    text = _number(row.ours, row.unit)
    if len(row.values) > 1:
        low, high = _number(min(row.values)), _number(max(row.values))
        text += f" ({low}–{high}, {len(row.values)} seeds)"
    return text


_VERDICTS = {
    "reached": "reached",
    "short": "**short**",
    "shown": "shown",
    "not run": "not run",
}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvswitch.sim.evaluation", "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"], default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["spread"] = _spread
    return environment


def _markdown(figures: Sequence[Figure], provenance: Provenance) -> str:
    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def of_rows(rows: Sequence[Row]) -> str:
        return table(
            ["", "paper", "ours", "ours / paper", "aim", "verdict"],
            [
                [
                    row.label,
                    _number(row.paper),
                    _spread(row),
                    _number(row.ratio),
                    "–" if row.aim is None else ("≤ " if row.lower else "≥ ") + _number(row.aim),
                    _VERDICTS[row.verdict],
                ]
                for row in rows
            ],
        )

    def of_table(t: Table) -> str:
        return f"{t.title}:\n\n{table(t.header, t.rows)}"

    sections = []
    for figure in figures:
        parts = [f"## {figure.title}", figure.text]
        parts += [of_rows(figure.rows)] if figure.rows else []
        parts += [of_table(t) for t in figure.tables]
        parts += [f"- {note}" for note in _notes(figure, provenance)]
        sections.append("\n\n".join(parts))
    template = _environment().get_template("evaluation.md.j2")
    return (
        template.render(
            provenance=provenance,
            counts=_counts(figures),
            sections="\n\n".join(sections),
            constants=table(["profile", "constant", "value", "source"], _constants()),
        ).rstrip()
        + "\n"
    )
