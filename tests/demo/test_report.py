"""The demo's report: the table, summary.json and the HTML page, from made-up runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from kvswitch import SwapStats
from kvswitch_demo.report import print_table, summary, write_html, write_summary
from kvswitch_demo.report.compare import compare_tokens, times_better
from kvswitch_demo.report.provenance import Machine, Provenance
from kvswitch_demo.report.transcripts import Absence, Transcript, Utterance
from kvswitch_demo.results import (
    IterationRecord,
    RunResult,
    TransferRecord,
    TurnRecord,
    figures,
)

# mode: seconds of a forward, of a switch on the engine's thread, of an absence, copies for a block
MODES = {
    "reference": (0.11, 0.0, 0.2, 0.0),
    "recompute": (0.24, 0.0, 3.0, 0.0),
    "per-block": (0.11, 0.03, 1.1, 60.0),
    "kvswitch": (0.11, 0.003, 1.0, 0.08),
}
BLOCK_BYTES = 737_280
SECTIONS = ("shows", "workload", "table", "plots", "timeline", "conversations", "definitions")


def make_run(mode: str, *, turns: int = 104, seed: int = 0) -> RunResult:
    """A plausible run: times are drawn, tokens are the same in every mode."""
    forward, stall, absence, copies = MODES[mode]
    rng = np.random.default_rng(seed)
    run = RunResult(mode, 0.0, [], [], [], SwapStats(), BLOCK_BYTES, 0, 2.0, 5.0, {})
    now = 0.0
    for i in range(6 * turns):
        leave, come = rng.integers(0, 4, 2).tolist() if i % 10 == 0 and i else (0, 0)
        if mode == "reference":
            leave = come = 0
        prefilled = int(rng.integers(0, 128)) if rng.random() < 0.4 or mode == "recompute" else 0
        recomputed = int(0.8 * prefilled) if mode == "recompute" else 0
        wait = stall * (leave + come) * rng.uniform(0.7, 1.3)
        plan = rng.uniform(2e-4, 6e-4)
        ready = now + plan + wait
        end = ready + forward * rng.lognormal(0, 0.15)
        run.iterations.append(
            IterationRecord(
                now, ready, end, wait, plan, 8, prefilled, leave, come, i // 10, recomputed
            )
        )
        if copies:
            copy_out_and_in(run, leave, come, now + plan, copies, rng)
        run.stats.preemptions += leave
        run.recomputed_tokens += recomputed
        now = end + 1e-4
    run.seconds = now
    for turn, arrival in enumerate(np.sort(rng.uniform(0, now, turns)).tolist()):
        gaps = forward * rng.lognormal(0, 0.2, 48)
        gaps[0] = absence * rng.lognormal(-0.5, 0.8)
        gaps[1:] += absence * rng.lognormal(0, 0.5, 47) * (rng.random(47) < 0.03)
        times = (arrival + np.cumsum(gaps)).tolist()
        run.turns.append(TurnRecord(turn % 34, turn // 34, arrival, 64, times))
    tokens = np.random.default_rng(seed).integers(0, 49152, (34, 300))
    run.tokens = dict(enumerate(tokens.tolist()))
    return run


def copy_out_and_in(
    run: RunResult, leave: int, come: int, begin: float, copies: float, rng: np.random.Generator
) -> None:
    for out, count in ((False, come), (True, leave)):
        at = begin
        for _ in range(count):
            blocks = int(rng.integers(2, 8) if out and run.mode == "kvswitch" else 28)
            pieces = max(1, round(blocks * copies))
            seconds = blocks * 2.5e-4 + pieces * 8e-6
            nbytes = blocks * BLOCK_BYTES
            run.transfers.append(TransferRecord(out, at, at + seconds, blocks, pieces, nbytes))
            at += seconds
            if not out:
                run.stats.blocks_in += blocks
                run.stats.copies_in += max(1, pieces // 60)
            elif run.mode == "kvswitch":
                run.stats.blocks_out_incremental += blocks
                run.stats.copies_out_incremental += 1
                run.stats.blocks_spared += 28 - blocks
            else:
                run.stats.blocks_out_full += blocks
                run.stats.copies_out_full += blocks


def make_runs(turns: int = 104) -> list[RunResult]:
    return [make_run(mode, turns=turns) for mode in MODES]


PROVENANCE = Provenance(
    date="2026-01-02T03:04:05+00:00",
    command="kvswitch demo --seed 0 --rate 0.8",
    seed=0,
    workload={
        "seed": 0,
        "conversations": {"count": 34, "turns": 4, "rate": 0.8},
        "priorities": {"policy": "markov", "epoch": 10},
        "engine": {"block_tokens": 16, "memory_share": 0.34, "bandwidth": "8GB"},
    },
    machine=Machine("Imaginary CPU <3 GHz>", 2, 8 * 2**30, "Linux 6.1"),
    versions={"kvswitch": "0.1.0", "python": "3.11.7", "numpy": "2.4", "torch": "2.13"},
)

TRANSCRIPTS = [
    Transcript(
        conversation,
        (
            Utterance("user", "Is 1 < 2 & 3 > 2?"),
            Utterance(
                "assistant",
                "Yes: <b>one</b> is less than two, and three is more than two. " * 3,
                (Absence(7, 21, 12.31, 14.02), Absence(20, 80, 15.5, 15.9)),
            ),
            Utterance("user", "Thank you."),
            Utterance("assistant", "You are welcome.", (Absence(0, 0, 20.0, 21.0),)),
        ),
    )
    for conversation in (3, 7, 12)
]


@pytest.fixture(scope="module")
def runs() -> list[RunResult]:
    return make_runs()


@pytest.fixture(scope="module")
def page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(path, runs, compare_tokens(runs), PROVENANCE, TRANSCRIPTS)
    return path.read_text(encoding="utf-8")


def printed(runs: list[RunResult], width: int = 110) -> str:
    console = Console(file=StringIO(), width=width)
    print_table(console, runs, compare_tokens(runs))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def cells(text: str, label: str) -> list[str]:
    """The words behind a label in the table, unit included."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


# -- the table ---------------------------------------------------------------------------------


def test_table_shows_every_modes_figures_in_its_column(runs: list[RunResult]) -> None:
    text = printed(runs)
    every = [figures(run) for run in runs]
    assert cells(text, "throughput")[1:] == [f"{f['throughput_tokens_per_s']:.1f}" for f in every]
    assert cells(text, "TTFT p95")[1:] == [f"{f['ttft_p95']:.2f}" for f in every]
    gaps = [f"{1e3 * f['tbt_p99']:,.0f}" for f in every]
    assert cells(text, "between tokens p99 ")[1:] == gaps
    assert cells(text, "stall time")[1:] == [f"{f['stall']:.3f}" for f in every]
    assert cells(text, "recomputed tokens") == [f"{f['recomputed_tokens']:,}" for f in every]
    ratios = times_better(runs)
    assert f"{ratios['per-block']['stall']:,.2f}x" in text
    verdict = "identical in recompute, per-block, kvswitch and the run without preemption"
    assert verdict in in_one_line(text)


def test_table_fits_a_terminal_of_eighty_columns(runs: list[RunResult]) -> None:
    narrow, wide = printed(runs, 80), printed(runs, 200)
    assert max(map(len, narrow.splitlines())) <= 80
    for label in ("throughput", "incremental swap-out", "scheduling overhead"):
        assert cells(narrow, label) == cells(wide, label)


def test_too_few_samples_are_a_dash_with_a_footnote(tmp_path: Path) -> None:
    few = make_runs(turns=24)
    text = printed(few)
    dash = "\N{EN DASH}*"
    assert dash not in printed(make_runs(turns=250))
    assert cells(text, "TTFT p90") == ["s", dash, dash, dash, dash]
    assert dash not in cells(text, "TTFT p50")
    assert f"{dash} too few samples" in text
    identity = compare_tokens(few)
    write_html(tmp_path / "r.html", few, identity, PROVENANCE)
    assert f"{dash} too few samples" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert summary(few, identity, PROVENANCE)["modes"]["kvswitch"]["ttft_p95"] is None


# -- summary.json ------------------------------------------------------------------------------


def test_summary_survives_json(runs: list[RunResult], tmp_path: Path) -> None:
    identity = compare_tokens(runs)
    write_summary(tmp_path / "summary.json", runs, identity, PROVENANCE)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["modes"] == {run.mode: figures(run) for run in runs}
    assert list(data["modes"]) == list(MODES)
    assert data["times_better"] == times_better(runs)
    assert data["identity"]["identical"] is True
    assert data["identity"]["differences"] == {}
    assert msgspec.convert(data, Provenance) == PROVENANCE
    write_summary(tmp_path / "again.json", runs, identity, PROVENANCE)
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text


def test_summary_is_plain_json_or_none_at_all(tmp_path: Path) -> None:
    runs = [make_run("kvswitch")]
    runs[0].inversion_seconds = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_summary(tmp_path / "summary.json", runs, compare_tokens(runs), PROVENANCE)
    assert not (tmp_path / "summary.json").exists()


def test_summary_names_a_difference() -> None:
    runs = make_runs()
    runs[1].tokens[2][3] = -1
    data = summary(runs, compare_tokens(runs), PROVENANCE)
    assert data["identity"]["identical"] is False
    assert data["identity"]["differences"]["recompute"]["position"] == 3


# -- the page ----------------------------------------------------------------------------------


class PageParser(HTMLParser):
    """Collects ids, attributes and text, and that every element is closed."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(page: str) -> PageParser:
    parser = PageParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_has_all_sections_and_unique_ids(page: str) -> None:
    parser = parsed(page)
    assert [id_ for id_ in parser.ids if id_ in (*SECTIONS, "reproduce")] == [
        *SECTIONS,
        "reproduce",
    ]
    assert len(set(parser.ids)) == len(parser.ids)
    assert page.count("<svg ") == 4


def test_page_needs_no_network_and_no_script(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<object|<iframe|xlink", page)
    ids = set(parsed(page).ids)
    for tag, name, value in parsed(page).attributes:
        assert name not in {"src", "srcset", "action"}, (tag, name)
        assert not name.startswith("on"), (tag, name)
        if name == "href":
            assert value[0] == "#"
            assert value[1:] in ids
    for url in re.findall(r"url\(([^)]*)\)", page):
        assert url.strip("\"'")[1:] in ids


def test_page_is_drawn_in_colours_of_its_theme(page: str) -> None:
    for name in MODES:
        assert f"--{name}: #" in page
        assert f"fill: var(--{name})" in page
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}", svg)


def test_page_shows_figures_machine_and_command(page: str, runs: list[RunResult]) -> None:
    text = parsed(page).text
    ours, theirs = figures(runs[3]), figures(runs[2])
    assert f"{ours['stall']:.3f} s altogether, instead of {theirs['stall']:.3f} s" in text
    assert "are identical in recompute, per-block, kvswitch and the run without preemption" in text
    assert "Imaginary CPU <3 GHz>, 2 cores" in text
    assert "kvswitch demo --seed 0 --rate 0.8" in text
    assert "new conversations per second" in text
    assert "torch 2.13" in text


def test_text_of_conversations_is_escaped_and_marked(page: str) -> None:
    assert "<b>one</b>" not in page
    text = parsed(page).text
    assert "Is 1 < 2 & 3 > 2?" in text
    assert text.count("out after token 7 at 12.3 s, back at 14.0 s") == 3
    assert "Yes: <b>one</b> is le out after token 7" in text
    assert "Conversation 7, away 3 times" in text


def test_page_says_so_when_tokens_differ(tmp_path: Path) -> None:
    runs = make_runs()
    runs[2].tokens[1][250] = -7
    write_html(tmp_path / "r.html", runs, compare_tokens(runs), PROVENANCE)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'class="verdict bad"' in page
    assert "conversation 1 at position 250: token -7" in page


def test_page_of_one_mode_without_switches_leaves_out_what_there_is_not(tmp_path: Path) -> None:
    runs = [make_run("reference")]
    write_html(tmp_path / "r.html", runs, compare_tokens(runs), PROVENANCE)
    parser = parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "timeline" not in parser.ids
    assert "conversations" not in parser.ids
