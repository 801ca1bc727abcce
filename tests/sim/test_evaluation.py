"""`kvswitch evaluate`: verdicts, results kept, and a report that says what is missing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from kvswitch.errors import ConfigError
from kvswitch.sim import commands
from kvswitch.sim.evaluation import jobs
from kvswitch.sim.evaluation.figure import Row
from kvswitch.sim.evaluation.figures import make_figures
from kvswitch.sim.evaluation.jobs import Job, Results, run_job, run_jobs
from kvswitch.sim.evaluation.plan import FULL, QUICK, Plan, Scale
from kvswitch.sim.evaluation.report import Provenance, write_report
from kvswitch.sim.metrics import Result

TINY = Scale(
    "tiny",
    seeds=2,
    conversations=6,
    fewer=5,
    epochs=(50, 25),
    groups=(4, 60),
    memory=(20.0, 60.0),
    rates=(1.0,),
    variants=1,
)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("", 2.0, [2.5, 1.9, 2.0], aim=2.0), "reached"),
        (Row("", 2.0, [1.9, 1.9, 2.5], aim=2.0), "short"),
        (Row("", 1.0, [0.4], aim=0.5, lower=True), "reached"),
        (Row("", 1.0, [0.6], aim=0.5, lower=True), "short"),
        (Row("", 1.0, [0.6]), "shown"),
        (Row("", 1.0, [], aim=0.5), "not run"),
    ],
)
def test_verdicts_judge_the_median(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_a_full_evaluation_asks_for_what_the_paper_shows() -> None:
    all_jobs = set(Plan(FULL).jobs())
    assert {job.conversations for job in all_jobs if job.seed} == {1000}
    seeds = [j.seed for j in all_jobs if (j.system, j.model, j.pattern) == ("kvswitch", "qwen-32b",
             "random") and j.reading == "conversations" and j.conversations == 1000]  # fmt: skip
    assert sorted(seeds) == [0, 1, 2, 3, 4]
    assert len(set(Plan(QUICK).jobs())) < len(all_jobs)


def test_a_result_is_known_by_all_that_decides_about_it() -> None:
    job = Job(system="kvswitch")
    others = [
        Job(system="kvswitch", seed=1),
        Job(system="kvswitch", engine=(("flops_utilisation", 0.5),)),
        Job(system="vllm-swap"),
    ]
    assert len({job.key, *(other.key for other in others)}) == 4
    assert job.key == Job(system="kvswitch").key


def test_changed_constants_change_results() -> None:
    job = Job(system="vllm-swap", conversations=6)
    slower = msgspec.structs.replace(job, link=(("loop_dispatch", 50.0),))
    assert run_job(slower).stall > run_job(job).stall > 0


def test_results_are_kept_and_not_run_again(tmp_path: Path) -> None:
    job = Job(system="kvswitch", conversations=4)
    run_jobs([job, job], Results(tmp_path), 1)
    kept = Results(tmp_path)
    assert kept.missing([job]) == []
    assert kept.get(job) is not None
    run_jobs([job], kept, 1, lambda job, result: pytest.fail("it has been run"))
    # What a killed run has left behind is no result.
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert Results(tmp_path).missing([job]) == [job]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = Results(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot keep results"):
        run_jobs([Job(system="kvswitch", conversations=4)], results, 1)


def test_what_has_not_been_run_is_said(tmp_path: Path) -> None:
    plan = Plan(TINY)
    provenance = Provenance.here(command="test", scale="tiny", missing=9, jobs=9)
    write_report(tmp_path, make_figures(plan, Results(tmp_path / "none")), provenance)
    page = (tmp_path / "evaluation.md").read_text()
    assert "9 have not been run" in page
    assert "| not run |" in page
    assert "reached |" not in page.split("## Definitions")[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few jobs, of which only one for each system and model is really run."""

    @cache
    def run(system: str, model: str, gpu: str) -> Result:
        return run_job(Job(system=system, model=model, gpu=gpu, conversations=4, think=0.0))

    monkeypatch.setattr(commands, "QUICK", TINY)
    monkeypatch.setattr(jobs, "run_job", lambda job: run(job.system, job.model, job.gpu))


@pytest.mark.usefixtures("tiny")
def test_the_command_runs_everything_once_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ["--quick", "--processes", "1", "--cache", str(tmp_path / "cache")]
    arguments += ["--output", str(out), "--docs", str(tmp_path / "docs")]
    first = CliRunner().invoke(commands.evaluate, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["missing"] == 0
    figures = numbers["figures"]
    assert {"figure1", "figure2", "figure4", "figure8-turns", "figure8-conversations",
            "figure8-throughput", "figure9", "figure10", "figure11", "figure12", "figure13",
            "table1", "granularity", "load", "sensitivity", "check"} == set(figures)  # fmt: skip
    rows = [row for figure in figures.values() for row in figure["rows"]]
    assert not [row for row in rows if row["verdict"] == "not run" and row["aim"]]
    assert {row["seeds"] for row in figures["figure8-turns"]["rows"]} == {2}
    speedup = figures["figure8-turns"]["rows"][0]
    assert speedup["ratio"] == pytest.approx(speedup["ours"] / 5.8, rel=1e-3)
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 10
    assert "measured peak of PCIe 4.0" in page
    assert (tmp_path / "docs" / "evaluation.md").read_text() == (out / "evaluation.md").read_text()

    elsewhere = ["--measured", str(tmp_path / "nowhere"), "--output", str(tmp_path / "again")]
    again = CliRunner().invoke(commands.evaluate, arguments + elsewhere, catch_exceptions=False)
    count = len(set(Plan(TINY).jobs()))
    assert f"{count} simulations, 0 of them" in first.output
    assert f"{count} simulations, {count} of them" in again.output


# -- simulate ------------------------------------------------------------------------------------


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(commands.simulate, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_simulate_answers_for_a_workload_of_ones_own(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 200 * i, "input_length": 700 + 10 * i, "output_length": 40,
         "hash_ids": [0, 2 * i + 1]}
        for i in range(20)
    ]  # fmt: skip
    trace.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.json"
    text = simulate("--trace", str(trace), "--conversations", "12", "--output", str(out))
    assert "12 conversations, 12 turns" in text
    assert "Host memory:" in text
    assert "Priorities: " in text
    numbers = json.loads(out.read_text())
    assert set(numbers["runs"]) == {"vllm-v1", "vllm-v1-offload", "kvswitch"}
    assert all(run["turns"] == 12 for run in numbers["runs"].values())
    assert len(numbers["sweeps"]["host memory, GB"]) == 5


def test_simulate_takes_other_gpus_and_faster_traces(tmp_path: Path) -> None:
    text = simulate("--gpu", "h100", "--conversations", "4", "--no-sweeps", "--systems", "kvswitch")
    assert "LLaMA-3-8B on H100 80 GB" in text
    assert "Host memory:" not in text


def test_advice_is_given_only_where_something_is_as_good_as_the_best() -> None:
    fast, prompt = {"throughput": 100.0, "ttft_p95": 2.0}, {"throughput": 50.0, "ttft_p95": 1.0}
    assert commands._first_as_good([fast, prompt]) is None
    assert commands._first_as_good([prompt, fast, {**fast, "ttft_p95": 1.05}]) is not None


def test_what_cannot_be_done_is_said_before_anything_is_simulated(tmp_path: Path) -> None:
    for arguments, complaint in (
        (["--speed", "2"], "no times of its own"),
        (["--output", str(tmp_path / "nowhere" / "out.json")], "cannot write"),
    ):
        result = CliRunner().invoke(commands.simulate, arguments)
        assert result.exit_code == 1
        assert complaint in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "a11"], "did you mean 'a10'"),
        (["--model", "nowhere.json"], "cannot read model nowhere.json"),
        (["--model", "qwen-32b"], "does not fit"),
        (["--systems", "x"], "no system 'x'"),
        (["--trace", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--link", "nowhere.json"], "cannot read calibration nowhere.json"),
    ],
)
def test_mistakes_are_named(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        CliRunner().invoke(commands.simulate, arguments, catch_exceptions=False)
