"""`kvswitch calibrate`: measure the ways of copying, keep the table, say what it chose and why."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvswitch.messages import Direction
from kvswitch_cuda.dispatch import Way
from kvswitch_cuda.measuring import COUNTS, SIZES
from kvswitch_cuda.measuring import calibrate as measure
from kvswitch_cuda.table import CopyTable, Sample

__all__ = ["calibrate"]

_TITLES = {Direction.OUT: "GPU to host", Direction.IN: "host to GPU"}


@click.command()
@click.option("--device", type=int, default=0, show_default=True, help="Number of the GPU.")
@click.option(
    "--thread-blocks",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Multiprocessors that the copy kernel may take.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the table there, not to the cache."
)
def calibrate(*, device: int, thread_blocks: int, output: Path | None) -> None:
    """Measure every way of copying between a GPU and the host, for pieces of all sizes."""
    console = Console()
    with console.status("measuring") as status:

        def tell(sample: Sample) -> None:
            status.update(
                f"{Way(sample.way).name.lower()}, {_TITLES[Direction(sample.direction)]}: "
                f"{sample.count} x {sample.nbytes >> 10} KiB"
            )

        table = measure(device, thread_blocks=thread_blocks, on_sample=tell)
    console.print(f"{table.gpu}, CUDA {table.driver // 1000}.{table.driver % 1000 // 10}")
    for direction in Direction:
        _print(console, table, direction)
    console.print(
        f"Windows of {table.window_bytes >> 20} MiB: the slower direction moves one in 80 us. "
        "The kernel is chosen only where it is 1.5 times faster, since it takes multiprocessors."
    )
    place = table.save(output)
    console.print(f"Kept in {place}" if place else "There is no place to keep the table.")


def _print(console: Console, table: CopyTable, direction: Direction) -> None:
    """GB/s of each way with the most pieces measured, and the choice for each number of pieces."""
    best = table.choices(direction).best
    ways = sorted({s.way for s in table.samples})
    shown = Table(f"{_TITLES[direction]}, piece", box=None, header_style="bold")
    for way in ways:
        shown.add_column(f"{Way(way).name.lower()}, GB/s", justify="right")
    shown.add_column(f"chosen for {', '.join(map(str, COUNTS))} pieces")
    for size, row in zip(SIZES, best.tolist(), strict=True):
        cells = []
        for way in ways:
            samples = [
                s for s in table.samples if (s.direction, s.way, s.nbytes) == (direction, way, size)
            ]
            most = max(samples, key=lambda s: s.count)
            cells.append(f"{most.bandwidth / 1e9:.1f} ({most.count})")
        shown.add_row(f"{size >> 10} KiB", *cells, ", ".join(Way(w).name.lower() for w in row))
    console.print(shown)
