"""`kvswitch evaluate` and `kvswitch simulate`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvswitch.sim.calibration import read_calibration
from kvswitch.sim.evaluation.check import figure as check
from kvswitch.sim.evaluation.figure import Figure
from kvswitch.sim.evaluation.figures import make_figures
from kvswitch.sim.evaluation.jobs import Job, Results, run_jobs
from kvswitch.sim.evaluation.plan import FULL, QUICK, Plan
from kvswitch.sim.evaluation.report import Provenance, write_docs, write_report
from kvswitch.sim.metrics import Result
from kvswitch.sim.profiles import load_profiles
from kvswitch.sim.run import Machine, Priorities
from kvswitch.sim.run import simulate as run_simulation
from kvswitch.sim.systems import SYSTEMS, find_system
from kvswitch.sim.workload import Script, Workload, load_lengths, load_trace, sample

__all__ = ["evaluate", "simulate"]

_COLUMNS = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


# -- evaluate ------------------------------------------------------------------------------------


@click.command()
@click.option("--quick", is_flag=True, help="A small version, in a minute.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=min(2, os.cpu_count() or 1),
    show_default=True,
    help="Simulations at a time.",
)
@click.option(
    "--no-run",
    is_flag=True,
    help="Report on the results there are; only the check against the demo is simulated.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path(".evaluation"),
    show_default=True,
    help="Folder of results; what is there, for the same code and settings, is not run again.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("evaluation-report"),
    show_default=True,
    help="Folder for report.html, evaluation.md and evaluation.json.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    default=Path("docs/benchmarks/demo-seeds.json"),
    show_default=True,
    help="A seeds.json or summary.json of `kvswitch demo`: the simulator is compared with it, "
    "if it is there.",
)
@click.option(
    "--docs",
    type=click.Path(path_type=Path),
    help="Also write evaluation.md and benchmarks/evaluation.json here.",
)
def evaluate(
    *,
    quick: bool,
    processes: int,
    no_run: bool,
    cache: Path,
    output: Path,
    measured: Path,
    docs: Path | None,
) -> None:
    """Regenerate the paper's figures and Table 1 by simulation, beside the paper's numbers."""
    console = Console()
    plan = Plan(QUICK if quick else FULL)
    jobs = list(dict.fromkeys(plan.jobs()))
    results = Results(cache)
    missing = results.missing(jobs)
    console.print(f"{len(jobs)} simulations, {len(jobs) - len(missing)} of them in {cache}")
    if missing and not no_run:
        with Progress(TextColumn("{task.description}"), *_COLUMNS, console=console) as progress:
            task = progress.add_task("simulating", total=len(missing))

            def done(job: Job, result: Result) -> None:
                progress.update(
                    task, advance=1, description=f"{job.system}, {result.real_seconds:.0f} s"
                )

            run_jobs(missing, results, processes, done)
    provenance = Provenance.here(
        command=shlex.join(["kvswitch", *sys.argv[1:]]),
        scale=plan.scale.name,
        missing=len(results.missing(jobs)),
        jobs=len(jobs),
    )
    figures = make_figures(plan, results)
    if measured.exists():
        figures.append(check(measured))
    write_report(output, figures, provenance)
    if docs:
        write_docs(docs, figures, provenance)
    _print_verdicts(console, figures)
    console.print(f"[bold]{output / 'report.html'}[/] tells the rest. All of it is simulated.")


def _print_verdicts(console: Console, figures: Sequence[Figure]) -> None:
    table = Table("", box=None)
    for header in ("paper", "ours", "aim", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    style = {"reached": "green", "short": "red"}
    for figure in figures:
        judged = [row for row in figure.rows if row.aim is not None]
        if judged:
            table.add_row(f"[bold]{figure.title}[/]")
        for row in judged:
            verdict = row.verdict
            table.add_row(
                f"  {row.label}",
                "-" if row.paper is None else f"{row.paper:.3g}",
                "-" if row.ours is None else f"{row.ours:.3g}",
                ("<= " if row.lower else ">= ") + f"{row.aim:.3g}",
                f"[{style.get(verdict, 'dim')}]{verdict}[/]",
            )
    console.print(table)


# -- simulate ------------------------------------------------------------------------------------

_SETTING = load_profiles().setting
_QUESTIONED = ("vllm-v1", "vllm-v1-offload", "kvswitch")


@click.command()
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Mooncake (.jsonl), Azure (.csv), ShareGPT (.json) or lengths (.csv, .csv.gz); "
    "by default the ShareGPT lengths that come with the package.",
)
@click.option("--model", default="llama-8b", show_default=True, help="A name, or a config.json.")
@click.option(
    "--gpu",
    default="a10",
    show_default=True,
    help="One of: " + ", ".join(load_profiles().gpu) + ".",
)
@click.option(
    "--link", type=click.Path(path_type=Path), help="Table written by `kvswitch calibrate`."
)
@click.option(
    "--host-memory",
    type=click.FloatRange(0, min_open=True),
    default=_SETTING.host_memory,
    show_default=True,
    help="GB for copies.",
)
@click.option(
    "--conversations",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="How many to draw, or to take from the beginning of a trace with times.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=0.2,
    show_default=True,
    help="Conversations a second, where the trace has no times.",
)
@click.option(
    "--think",
    type=click.FloatRange(0),
    default=_SETTING.think,
    show_default=True,
    help="Mean seconds between turns, where the trace has no times.",
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Play a trace with times of its own so many times faster.",
)
@click.option(
    "--pattern",
    type=click.Choice(["markov", "random"]),
    default="markov",
    show_default=True,
    help="How priorities change.",
)
@click.option(
    "--epoch",
    type=click.IntRange(6),
    default=25,
    show_default=True,
    help="Iterations between priority updates.",
)
@click.option(
    "--systems",
    default=",".join(_QUESTIONED),
    show_default=True,
    help=f"To be compared, of {', '.join(SYSTEMS)}.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--sweeps/--no-sweeps",
    default=True,
    show_default=True,
    help="Also ask what host memory is worth having, and how often priorities may change.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for all numbers.")
def simulate(
    *,
    trace: Path | None,
    model: str,
    gpu: str,
    link: Path | None,
    host_memory: float,
    conversations: int,
    rate: float,
    think: float,
    speed: float,
    pattern: Any,
    epoch: int,
    systems: str,
    seed: int,
    sweeps: bool,
    output: Path | None,
) -> None:
    """Say what kvswitch would give for a workload, a model and a GPU of your own."""
    console = Console()
    machine = replace(Machine.of(gpu, model), host_memory=host_memory)
    if link:
        machine = replace(machine, link=read_calibration(link, machine.link))
    names = systems.split(",")
    chosen = [find_system(name) for name in names]
    draw: dict[str, Any] = {
        "seed": seed, "count": conversations, "rate": rate, "think": think,
        "context": machine.model.context,
    }  # fmt: skip
    workload = load_trace(trace, **draw) if trace else sample(load_lengths(), **draw)
    if speed != 1.0 and workload.drawn:
        raise click.ClickException(f"{workload.name} has no times of its own: give --rate")
    workload = _fit(workload, machine, conversations, speed)
    if output:
        _check_writable(output)
    console.print(
        f"{machine.model.name} on {machine.gpu.name}: {machine.device_blocks:,} device blocks of "
        f"{machine.engine.block_tokens} tokens, {machine.host_blocks:,} on the host"
    )
    console.print(
        f"{workload.name}: {len(workload.scripts):,} conversations, {workload.turns:,} turns, "
        f"{workload.output_tokens:,} output tokens, {workload.offered():,.0f} a second asked for; "
        f"{workload.excluded:,} left out (context of {machine.model.context:,} tokens, or memory)"
    )
    if workload.single:
        console.print(f"{workload.single:,} conversations of one turn were not drawn from.")
    priorities = Priorities(pattern, epoch, levels=_SETTING.levels, keep=_SETTING.keep)
    runs: dict[str, Result] = {}
    tables: dict[str, list[dict[str, float]]] = {}
    known: dict[tuple[str, float, int], Result] = {}
    with Progress(TextColumn("{task.description:>24}"), *_COLUMNS, console=console) as progress:

        def run(label: str, name: str, of: Machine, when: Priorities) -> Result:
            key = name, of.host_memory, when.epoch
            if key not in known:
                task = progress.add_task(label, total=workload.turns)
                known[key] = run_simulation(
                    find_system(name), workload.scripts, of, when, seed=seed,
                    on_progress=lambda turns: progress.update(task, completed=turns),
                )  # fmt: skip
                progress.update(task, completed=workload.turns)
            return known[key]

        for system in chosen:
            runs[system.name] = run(system.title, system.name, machine, priorities)
        if sweeps:
            tables["host memory, GB"] = [
                _row(
                    gb, run(f"{gb:g} GB", "kvswitch", replace(machine, host_memory=gb), priorities)
                )
                for gb in _around(machine)
            ]
            tables["iterations between priority updates"] = [
                _row(e, run(f"{e} iterations", "kvswitch", machine, replace(priorities, epoch=e)))
                for e in (10, 25, 50, 100, 200)
            ]
    _print_runs(console, runs)
    for title, rows in tables.items():
        _print_sweep(console, title, rows)
    if sweeps:
        _advise(console, tables)
    console.print(
        "All of it is simulated; see docs/evaluation.md for what it rests on.", style="dim"
    )
    if output:
        content = {
            "command": shlex.join(["kvswitch", *sys.argv[1:]]),
            "runs": msgspec.to_builtins(runs),
            "sweeps": tables,
        }
        output.write_text(json.dumps(content, indent=1) + "\n")


def _fit(workload: Workload, machine: Machine, conversations: int, speed: float) -> Workload:
    """Leave out what no system could hold, and keep the first conversations."""
    room = machine.device_blocks * machine.engine.block_tokens
    scripts = [script for script in workload.scripts if script.tokens <= room]
    excluded = workload.excluded + len(workload.scripts) - len(scripts)
    if not scripts:
        raise click.ClickException(f"no conversation fits into {room:,} tokens of device memory")
    scripts = scripts[:conversations]
    if speed != 1.0:
        scripts = [
            Script(
                script.arrival / speed,
                script.turns,
                script.pauses,
                None if script.due is None else [at / speed for at in script.due],
            )
            for script in scripts
        ]
    return replace(workload, scripts=scripts, excluded=excluded)


def _check_writable(output: Path) -> None:
    try:
        output.touch()
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error}") from error


def _around(machine: Machine) -> list[float]:
    """Sizes of host memory, in GB, around the machine's; each holds a block at least."""
    sizes = (machine.host_memory * factor for factor in (0.1, 0.25, 0.5, 1.0, 2.0))
    return [size for size in sizes if size * 1e9 >= machine.block_bytes]


def _row(value: float, result: Result) -> dict[str, float]:
    return {
        "value": value,
        "throughput": result.throughput,
        "ttft_p95": result.ttft["0.95"],
        "tbt_p99": result.tbt["0.99"],
        "stall_share": result.stall_share,
        "recomputed": result.recomputed,
    }


_SHOWN: tuple[tuple[str, Any], ...] = (
    ("tokens/s", lambda r: f"{r.throughput:,.0f}"),
    ("TTFT P50, s", lambda r: f"{r.ttft['0.5']:.2f}"),
    ("P95", lambda r: f"{r.ttft['0.95']:.2f}"),
    ("P99", lambda r: f"{r.ttft['0.99']:.2f}"),
    ("TBT P50, ms", lambda r: f"{1000 * r.tbt['0.5']:.0f}"),
    ("P99, s", lambda r: f"{r.tbt['0.99']:.2f}"),
    ("stall", lambda r: f"{r.stall_share:.1%}"),
    ("recomputed tokens", lambda r: f"{r.recomputed:,}"),
    ("inverted", lambda r: f"{r.inversion / r.makespan:.0%}"),
)


def _print_runs(console: Console, runs: dict[str, Result]) -> None:
    table = Table("", box=None)
    for header, _ in _SHOWN:
        table.add_column(header, justify="right")
    for name, result in runs.items():
        table.add_row(SYSTEMS[name].title, *(show(result) for _, show in _SHOWN))
    console.print(table)


def _print_sweep(console: Console, title: str, rows: list[dict[str, float]]) -> None:
    table = Table(f"kvswitch, {title}", box=None)
    for header in ("tokens/s", "TTFT P95, s", "TBT P99, s", "stall", "recomputed tokens"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            f"{row['value']:g}",
            f"{row['throughput']:,.0f}",
            f"{row['ttft_p95']:.2f}",
            f"{row['tbt_p99']:.2f}",
            f"{row['stall_share']:.1%}",
            f"{row['recomputed']:,.0f}",
        )
    console.print(table)


_WORTH = 0.98
"""Share of the best throughput with which more of something is not worth having."""
_LATER = 1.1
"""Times the best TTFT P95 that are as good as the best."""


def _advise(console: Console, tables: dict[str, list[dict[str, float]]]) -> None:
    memory, frequency = (_first_as_good(rows) for rows in tables.values())
    best = f"{_WORTH:.0%} of the best throughput and {_LATER:g} times the best TTFT P95"
    if memory:
        console.print(
            f"Host memory: {memory['value']:g} GB are enough for {best}, with "
            f"{memory['recomputed']:,.0f} tokens recomputed."
        )
    else:
        console.print(f"Host memory: no size that was tried reaches both {best}.")
    if frequency:
        console.print(f"Priorities: updates every {frequency['value']:g} iterations allow {best}.")
    else:
        console.print(f"Priorities: no frequency that was tried reaches both {best}.")


def _first_as_good(rows: list[dict[str, float]]) -> dict[str, float] | None:
    throughput = _WORTH * max(row["throughput"] for row in rows)
    latency = _LATER * min(row["ttft_p95"] for row in rows)
    good = (r for r in rows if r["throughput"] >= throughput and r["ttft_p95"] <= latency)
    return next(good, None)
