"""`kvswitch demo`: serve real conversations in four ways, and compare."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvswitch.sim.workload import load_lengths
from kvswitch_demo.model import Llama
from kvswitch_demo.report import (
    HEADLINE_LABELS,
    HEADLINES,
    Identity,
    Provenance,
    compare_tokens,
    print_table,
    summary,
    transcripts,
    write_html,
    write_summary,
)
from kvswitch_demo.results import RunResult, Switched
from kvswitch_demo.run import MODES, Mode, serve
from kvswitch_demo.text import PromptText
from kvswitch_demo.tokenizer import Tokenizer
from kvswitch_demo.weights import load_model
from kvswitch_demo.workload import Conversations, Workload

__all__ = ["demo"]

_QUICK = {"count": 10, "turns": 3}
_FULL = {"count": 260}


@click.command()
@click.option("--quick", is_flag=True, help="A quarter of the turns or less, in two minutes.")
@click.option("--full", is_flag=True, help="Ten times the work: enough turns for TTFT p99.")
@click.option("--seed", type=int, help="Draws conversations, arrivals and priorities.")
@click.option("--seeds", type=click.IntRange(1), default=1, help="Paired runs over so many seeds.")
@click.option("--rate", type=float, help="New conversations per second.")
@click.option("--memory", type=float, help="Device KV memory, as a share of all conversations'.")
@click.option("--policy", type=click.Choice(["random", "markov"]), help="Priority policy.")
@click.option("--epoch", type=int, help="Iterations between priority updates.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only these modes.")
@click.option("--model", type=click.Path(path_type=Path), help="GGUF file of a Llama model.")
@click.option("--workload", "workload_file", type=click.Path(path_type=Path), help="Workload file.")
@click.option("--lengths", type=click.Path(path_type=Path), help="CSV of conversation lengths.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="PyTorch device of the model; auto: CUDA where there is one, else the CPU.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-report"),
    show_default=True,
    help="Folder for summary.json and report.html.",
)
def demo(
    *,
    quick: bool,
    full: bool,
    seed: int | None,
    seeds: int,
    rate: float | None,
    memory: float | None,
    policy: str | None,
    epoch: int | None,
    modes: tuple[Mode, ...],
    model: Path | None,
    workload_file: Path | None,
    lengths: Path | None,
    device: str,
    output: Path,
) -> None:
    """Serve real multi-turn conversations with too little KV memory, in four ways."""
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    console = Console()
    workload = Workload.load(workload_file).replace(seed=seed)
    workload = workload.replace("conversations", **(_QUICK if quick else _FULL if full else {}))
    workload = workload.replace("conversations", rate=rate)
    workload = workload.replace("priorities", policy=policy, epoch=epoch)
    workload = workload.replace("engine", memory_share=memory)

    # One core is left to the copies, in every mode.
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    torch.set_num_threads(threads)
    tokenizer = Tokenizer(model)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    llama = load_model(model, device=device)
    demo_lengths = load_lengths(lengths)
    output.mkdir(parents=True, exist_ok=True)

    reports = []
    for offset in range(seeds):
        paired = workload.replace(seed=workload.seed + offset)
        scripts = paired.scripts(demo_lengths, PromptText(tokenizer, paired.seed))
        provenance = Provenance.here(
            command=shlex.join(["kvswitch", *sys.argv[1:]]),
            device=llama.device,
            seed=paired.seed,
            workload=msgspec.to_builtins(paired),
        )
        _print_workload(console, paired, scripts, threads, provenance.machine.gpu)
        runs, switched = _serve_all(console, llama, tokenizer, paired, scripts, modes or MODES)
        identity = compare_tokens(runs)
        print_table(console, runs, identity)
        reports.append(summary(runs, identity, provenance))
        if offset == 0:
            _write(output, runs, switched, identity, provenance, tokenizer)
            console.print(f"[bold]{output / 'report.html'}[/] and summary.json tell the rest.")
    if seeds > 1:
        _print_seeds(console, reports)
        (output / "seeds.json").write_text(json.dumps(reports, indent=2) + "\n")
    if not all(report["identity"]["identical"] for report in reports) and len(modes or MODES) > 1:
        raise SystemExit("tokens differ between modes")


def _serve_all(
    console: Console,
    model: Llama,
    tokenizer: Tokenizer,
    workload: Workload,
    scripts: Conversations,
    modes: tuple[Mode, ...],
) -> tuple[list[RunResult], list[Switched]]:
    """Serve the workload in each mode; the switches are those of the last one."""
    runs: list[RunResult] = []
    switched: list[Switched] = []
    total = sum(sum(script.outputs) for script in scripts)
    columns = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TextColumn("tokens"), TimeElapsedColumn(), console=console) as progress:
        tasks = {mode: progress.add_task(mode, total=total, start=False) for mode in modes}
        for mode in modes:
            task = tasks[mode]
            progress.start_task(task)
            result, switched = serve(
                model,
                mode,
                workload,
                scripts,
                never=tokenizer.control,
                on_tokens=lambda tokens, task=task: progress.advance(task, tokens),  # type: ignore[misc]
            )
            runs.append(result)
            if not console.is_terminal:  # nobody sees a bar move there
                console.print(f"  {mode}: {total:,} tokens in {result.seconds:.0f} s")
    return runs, switched


def _write(
    output: Path,
    runs: list[RunResult],
    switched: list[Switched],
    identity: Identity,
    provenance: Provenance,
    tokenizer: Tokenizer,
) -> None:
    write_summary(output / "summary.json", runs, identity, provenance)
    texts = transcripts(runs[-1], switched, tokenizer.decode)
    write_html(output / "report.html", runs, identity, provenance, texts)


def _print_workload(
    console: Console, workload: Workload, scripts: Conversations, threads: int, gpu: str
) -> None:
    turns = sum(len(script.prompts) for script in scripts)
    blocks = workload.device_blocks(scripts)
    console.print(
        f"{len(scripts)} conversations, {turns} turns, {sum(s.tokens for s in scripts):,} tokens; "
        f"device KV memory {blocks} blocks of {workload.engine.block_tokens} tokens; "
        + (gpu or f"{threads} compute thread{'s' * (threads > 1)}")
    )
    for section in ("conversations", "priorities", "engine"):
        values = msgspec.to_builtins(getattr(workload, section))
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        console.print(f"  {section}: {text}", style="dim")
    console.print(f"  seed: {workload.seed}", style="dim")


def _print_seeds(console: Console, reports: list[dict[str, Any]]) -> None:
    """Median and range of the paired ratios."""
    table = Table(f"kvswitch is better by (median of {len(reports)} seeds, range)", box=None)
    better = [report["times_better"] for report in reports]
    for mode in better[0]:
        table.add_column(f"than {mode}", justify="right")
    for name in HEADLINES:
        cells = []
        for mode in better[0]:
            values = [b[mode][name] for b in better if b[mode][name] is not None]
            span = f"({min(values):.2f} to {max(values):.2f})" if values else ""
            cells.append(f"{median(values):.2f}x {span}" if values else "–")
        table.add_row(HEADLINE_LABELS[name], *cells)
    console.print(table)
    same = sum(report["identity"]["identical"] for report in reports)
    console.print(f"Identical tokens in {same} of {len(reports)} seeds.")
