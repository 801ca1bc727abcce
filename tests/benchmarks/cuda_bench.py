"""Copies between a GPU and the host beside what its link can do: `make gpu-bench`.

Every figure stands beside the limit measured in the same run: one large copy from or to pinned
memory. Needs numpy, msgspec, pluggy, sortedcontainers, cuda-bindings, cuda-core and numba; torch
for the decode section, matplotlib for plots. A full run takes about six minutes, ``--quick`` two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvswitch.messages import Direction, Runs, Transfer
from kvswitch.transfer import Layout, Region, TransferEngine, coalesce, lower
from kvswitch_cuda import CudaBackend, PinnedArena
from kvswitch_cuda.context import Context
from kvswitch_cuda.dispatch import attributes_of_stream_order

OUT, IN = Direction
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WAYS = ("batch", "loop", "kernel", "auto")
rng = np.random.default_rng(0)


class Bench:
    """Memory on both sides, and what has been found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick: bool = options.quick
        self.path: Path = options.output
        self.nbytes: int = int(options.memory * MIB) or (GIB if self.quick else 2 * GIB)
        self.began = time.perf_counter()
        self.budget: float = options.budget
        self.context = Context(options.device)
        self.driver = self.context.driver
        self.context.adopt_thread()
        self.found: dict[str, Any] = {"provenance": provenance(self.context, options)}
        self.numbers = count()
        self.pin()
        self.device = int(self.driver("cuMemAlloc", self.nbytes))

    def pin(self) -> None:
        """Pin the host's memory: how fast that goes."""
        began = time.perf_counter()
        self.arena = PinnedArena(self.nbytes, self.context.device)
        seconds = time.perf_counter() - began
        self.host = self.arena.address
        self.found["pinning"] = {
            "bytes": self.nbytes,
            "seconds": seconds,
            "GiB/s": self.nbytes / GIB / seconds,
        }

    def close(self) -> None:
        self.driver("cuMemFree", self.device)
        self.arena.close()
        self.driver("cuCtxSetCurrent", self.driver.api.CUcontext(0))
        self.context.close()

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.began)

    def save(self) -> None:
        self.found["provenance"]["seconds"] = round(time.perf_counter() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    # -- tools ---------------------------------------------------------------------------------

    def layouts(self, block: int, regions: int = 1) -> tuple[Layout, Layout]:
        """As many blocks of that many bytes in each region as fit."""
        blocks = self.nbytes // (block * regions)
        return tuple(  # type: ignore[return-value]
            Layout(
                tuple(Region(base + i * blocks * block, block, block) for i in range(regions)),
                blocks,
                seams,
            )
            for base, seams in ((self.device, ()), (self.host, self.arena.seams))
        )

    def scattered(self, blocks: int, most: int) -> tuple[Runs, int]:
        """Runs of one block each, no two of which adjoin on both sides; how many."""
        taken = min(blocks, most)
        src, dst = (rng.permutation(blocks)[:taken].astype(np.int32) for _ in range(2))
        return coalesce(src, dst), taken

    @contextmanager
    def engine(
        self, device: Layout, host: Layout, *, window: int | None = None, **settings: Any
    ) -> Iterator[TransferEngine]:
        backend = CudaBackend(self.context.device, **{"copies": "batch", **settings})
        with TransferEngine(backend, device, host, window_bytes=window) as engine:
            yield engine

    def move(self, engine: TransferEngine, direction: Direction, runs: Runs) -> float:
        """Seconds that a queue is busy with a transfer."""
        if direction is IN:
            runs = runs[:, [1, 0, 2]]
        ticket = engine.submit(Transfer(next(self.numbers), direction, runs))
        ticket.wait()
        engine.poll()
        return ticket.seconds

    def best(self, engine: TransferEngine, direction: Direction, runs: Runs, nbytes: int) -> float:
        """GB/s, the best of some runs after a first one."""
        times = [self.move(engine, direction, runs) for _ in range(3 if self.quick else 5)]
        return nbytes / min(times[1:]) / 1e9

    # -- sections --------------------------------------------------------------------------------

    def limits(self) -> None:
        """One large copy, each way and both at once: what everything else is beside."""
        nbytes = min(self.nbytes // 2, 512 * MIB)
        block = nbytes
        device, host = self.layouts(block)
        limits: dict[str, float] = {}
        whole = np.array([[0, 0, 1]], np.int32)
        with self.engine(device, host, window=2 * nbytes, copies="loop", pacing="host") as engine:
            for direction in Direction:
                limits[direction.name] = self.best(engine, direction, whole, nbytes)
            limits["both"] = self.both(engine, whole, np.array([[1, 1, 1]], np.int32), nbytes)
        self.found["limits_GB/s"] = limits

    def both(self, engine: TransferEngine, one: Runs, other: Runs, nbytes: int) -> float:
        """GB/s of both directions together, for as long as both are busy."""
        rates = []
        for _ in range(3 if self.quick else 5):
            tickets = [
                engine.submit(Transfer(next(self.numbers), direction, runs))
                for direction, runs in ((OUT, one), (IN, other[:, [1, 0, 2]]))
            ]
            engine.drain()
            engine.poll()
            span = max(t.ended for t in tickets) - min(t.started for t in tickets)
            rates.append(2 * nbytes / span / 1e9)
        return max(rates[1:])

    def sizes(self) -> None:
        """Bandwidth by the size of runs, for each way of copying."""
        rows: list[dict[str, Any]] = []
        kib = (8, 32, 256, 1024, 4096)
        if not self.quick:
            kib = (4, 8, 16, 24, 28, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
        for size in (k * KIB for k in kib):
            if self.left() < 150:
                break
            device, host = self.layouts(size)
            runs, taken = self.scattered(device.num_blocks, max(1, min(20_000, GIB // size)))
            for way in WAYS:
                with self.engine(device, host, copies=way) as engine:
                    for direction in Direction:
                        rate = self.best(engine, direction, runs, taken * size)
                        rows.append(
                            {"KiB": size // KIB, "way": way, "to": direction.name, "GB/s": rate}
                        )
        self.found["sizes"] = rows

    def both_ways(self) -> None:
        """Both directions at once, in runs of 2 MiB."""
        size = 2 * MIB
        device, host = self.layouts(size)
        blocks = min(device.num_blocks // 2, 256)
        ids = rng.permutation(2 * blocks).astype(np.int32)
        pairs = [coalesce(part, rng.permutation(part)) for part in (ids[:blocks], ids[blocks:])]
        rates = {}
        for way in ("batch", "kernel"):
            with self.engine(device, host, copies=way) as engine:
                rates[way] = self.both(engine, *pairs, blocks * size)
        self.found["both_ways_GB/s"] = rates

    def layers(self) -> None:
        """Pages of per-layer layouts: 64 regions, each page a copy of its own."""
        rows = []
        for size in (8 * KIB, 16 * KIB) if self.quick else (4 * KIB, 8 * KIB, 16 * KIB, 24 * KIB):
            device, host = self.layouts(size, regions=64)
            runs, taken = self.scattered(device.num_blocks, 300)
            for way in ("batch", "kernel", "auto"):
                with self.engine(device, host, copies=way) as engine:
                    for direction in Direction:
                        rate = self.best(engine, direction, runs, taken * size * 64)
                        rows.append(
                            {"KiB": size // KIB, "way": way, "to": direction.name, "GB/s": rate}
                        )
        self.found["layers"] = rows

    def submitting(self) -> None:
        """What 10,000 runs cost on the host: on the engine's thread, and on the dispatcher."""
        size, runs_wanted = 64 * KIB, 10_000
        device, host = self.layouts(size)
        runs, taken = self.scattered(device.num_blocks, runs_wanted)
        caller: list[float] = []
        with self.engine(device, host) as engine:
            for _ in range(10):
                transfer = Transfer(next(self.numbers), OUT, runs)
                began = time.perf_counter()
                ticket = engine.submit(transfer)
                caller.append(time.perf_counter() - began)
                ticket.wait()
                engine.poll()
        backend = CudaBackend(self.context.device, copies="batch", pacing="host")
        queue, attributes, zero = backend.open_queue(OUT), attributes_of_stream_order(), np.zeros(2)
        stream = self.context.open_stream()
        planning: list[float] = []
        dispatching: list[float] = []
        calling: list[float] = []
        for _ in range(10):
            marks = [time.perf_counter()]
            copies = lower(runs, device, host, window_bytes=2 * self.nbytes)
            marks.append(time.perf_counter())
            queue.copy(copies, 0, len(copies.src))
            marks.append(time.perf_counter())
            queue.record().wait()
            marks.append(time.perf_counter())
            self.driver.batch(
                copies.dst.ctypes.data,
                copies.src.ctypes.data,
                copies.nbytes.ctypes.data,
                len(copies.src),
                attributes.ctypes.data,
                zero.ctypes.data,
                1,
                zero.ctypes.data + 8,
                stream,
            )
            marks.append(time.perf_counter())
            self.driver("cuStreamSynchronize", self.driver.api.CUstream(stream))
            steps = np.diff(marks)
            planning.append(float(steps[0]))
            dispatching.append(float(steps[1]))
            calling.append(float(steps[3]))
        backend.close()
        self.context.close_stream(stream)
        self.found["submitting"] = {
            "runs": taken,
            "engine_thread_us": median(caller) * 1e6,
            "planning_us": median(planning) * 1e6,
            "dispatching_us": median(dispatching) * 1e6,
            "driver_call_us": median(calling) * 1e6,
            "beside_the_driver_us": (median(planning) + median(dispatching) - median(calling))
            * 1e6,
        }

    # -- beside the engine -----------------------------------------------------------------------

    @contextmanager
    def saturated(
        self, directions: tuple[Direction, ...], **settings: Any
    ) -> Iterator[Callable[[], float]]:
        """Swaps without a break; gives GB/s moved since it was last asked."""
        size = 2 * MIB
        device, host = self.layouts(size)
        runs, _ = self.scattered(device.num_blocks // 2, 256)
        upper = runs + np.array([device.num_blocks // 2] * 2 + [0], np.int32)
        stop, moved = threading.Event(), [0.0]
        since = [time.perf_counter()]

        def feed(engine: TransferEngine) -> None:
            waiting: dict[Direction, list[Any]] = {direction: [] for direction in directions}
            while not stop.is_set():
                for direction, tickets in waiting.items():
                    while len(tickets) < 3:
                        part = runs if direction is OUT else upper[:, [1, 0, 2]]
                        transfer = Transfer(next(self.numbers), direction, part)
                        tickets.append(engine.submit(transfer))
                    if tickets[0].done:
                        moved[0] += tickets.pop(0).nbytes
                engine.poll()
                time.sleep(0.0005)

        def rate() -> float:
            now = time.perf_counter()
            gbs = moved[0] / (now - since[0]) / 1e9
            since[0], moved[0] = now, 0.0
            return gbs

        with self.engine(device, host, **settings) as engine:
            thread = threading.Thread(target=feed, args=(engine,))
            thread.start()
            time.sleep(0.1)
            rate()
            try:
                yield rate
            finally:
                stop.set()
                thread.join()

    def probes(self) -> None:
        """How long a 4 KB copy of the engine waits while swaps saturate the link."""
        low_high = self.driver("cuCtxGetStreamPriorityRange")
        flags = self.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = int(self.driver("cuStreamCreateWithPriority", flags, low_high[1]))
        begin, end = self.context.take_event(), self.context.take_event()
        passed = np.zeros(1, np.float32)
        samples = 200 if self.quick else 1000  # a p99 needs 1000
        # Beside the two halves that the swaps use nothing may be touched: the last page of each.
        here, there = self.device + self.nbytes - 4096, self.host + self.nbytes - 4096

        def probe(direction: Direction) -> tuple[float, float]:
            """Microseconds by the device's clock, and by the host's, threads and GIL included."""
            dst, src = (there, here) if direction is OUT else (here, there)
            began = time.perf_counter()
            self.driver.record(begin, stream)
            self.driver.copy(dst, src, 4096, stream)
            self.driver.record(end, stream)
            while self.driver.query(end):
                pass
            seconds = time.perf_counter() - began
            self.driver.elapsed(passed.ctypes.data, begin, end)
            return float(passed[0]) * 1e3, seconds * 1e6

        def delays(direction: Direction) -> dict[str, float]:
            taken = []
            for _ in range(samples):
                time.sleep(rng.random() * 0.001)
                taken.append(probe(direction))
            device, host = np.array(taken).T
            return {
                **{f"p{q}_us": float(np.percentile(device, q)) for q in (50, 90, 99)},
                "host_p99_us": float(np.percentile(host, 99)),
            }

        rows: list[dict[str, Any]] = [
            {"load": "none", "to": direction.name, "GB/s": 0.0, **delays(direction)}
            for direction in Direction
        ]
        loads: dict[str, dict[str, Any]] = {
            "unbounded": {"window": 1 * GIB, "pacing": "host"},
            "host 4 MiB": {"window": 4 * MIB, "pacing": "host"},
            "device 4 MiB": {"window": 4 * MIB},
            "device, own window": {"copies": "auto"},
            "kernel": {"copies": "kernel"},
        }
        if not self.quick:
            loads |= {f"device {w} MiB": {"window": w * MIB} for w in (1, 2, 8)}
        for name, settings in loads.items():
            for direction in Direction:
                if self.left() < 60:
                    break
                with self.saturated((direction,), **settings) as rate:
                    same = delays(direction)
                    rows.append({"load": name, "to": direction.name, **same, "GB/s": rate()})
        self.found["probes"] = rows
        for event in (begin, end):
            self.context.return_event(event)
        self.context.close_stream(stream)

    def decode(self) -> None:
        """A decode-like CUDA graph, alone and beside swaps."""
        try:
            import torch
        except ImportError:
            return
        if not torch.cuda.is_available():
            return
        device = torch.device("cuda", self.context.device)
        shape = (24, 8192, 8192)
        weights = torch.randn(*shape, device=device, dtype=torch.bfloat16)
        x = torch.randn(shape[0], 16, 8192, device=device, dtype=torch.bfloat16)

        def step() -> None:
            for i in range(len(weights)):
                torch.mm(x[i], weights[i])

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(times: int = 50) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            taken = []
            for _ in range(times):
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                taken.append(begin.elapsed_time(end))
            return median(taken)

        replay()
        rows = []
        loads: dict[str, tuple[tuple[Direction, ...], dict[str, Any]]] = {
            "copy engines, out": ((OUT,), {}),
            "copy engines, in": ((IN,), {}),
            "copy engines, both": ((OUT, IN), {}),
            "kernel, 8 blocks, in": ((IN,), {"copies": "kernel"}),
            "kernel, 8 blocks, out": ((OUT,), {"copies": "kernel"}),
        }
        for name, (directions, settings) in loads.items():
            ratios, rates, alone = [], [], []
            for _ in range(2 if self.quick else 5):  # in pairs
                alone.append(replay())
                with self.saturated(directions, **settings) as rate:
                    beside = replay()
                    rates.append(rate())
                ratios.append(beside / alone[-1])
            rows.append(
                {
                    "load": name,
                    "alone_ms": median(alone),
                    "slowdown": median(ratios) - 1,
                    "range": [min(ratios) - 1, max(ratios) - 1],
                    "GB/s": median(rates),
                }
            )
        self.found["decode"] = rows

    def busy(self) -> None:
        """Transfers while the main thread computes in Python: one, and several in a row."""
        size = 2 * MIB
        device, host = self.layouts(size)
        runs, taken = self.scattered(device.num_blocks, 512)
        rows = []
        loads: dict[str, dict[str, Any]] = {
            "device": {},
            "host": {"pacing": "host", "window": 8 * MIB},
        }
        for pacing, settings in loads.items():
            with self.engine(device, host, **settings) as engine:
                for direction in Direction:
                    idle = self.best(engine, direction, runs, taken * size)
                    part = runs if direction is OUT else runs[:, [1, 0, 2]]
                    row = {"pacing": pacing, "to": direction.name, "idle_GB/s": idle}
                    for name, count in (("one_GB/s", 1), ("wall_GB/s", 8)):
                        walls = []
                        for _ in range(5):
                            began = time.perf_counter()
                            for _ in range(count):
                                last = engine.submit(Transfer(next(self.numbers), direction, part))
                            while not last.done:
                                pass
                            walls.append(time.perf_counter() - began)
                            engine.poll()
                        row[name] = count * taken * size / median(walls) / 1e9
                    rows.append(row)
        self.found["busy_main_thread"] = rows

    def timeline(self) -> None:
        """When transfers of both directions ran, for a plot."""
        device, host = self.layouts(MIB)
        half = device.num_blocks // 2
        began = time.perf_counter()
        tickets = []
        with self.engine(device, host) as engine:
            for i in range(24):
                ids = (rng.permutation(half)[: rng.integers(4, 100)] + half * (i % 2)).astype("i4")
                runs = coalesce(ids, ids)
                tickets.append(engine.submit(Transfer(next(self.numbers), Direction(i % 2), runs)))
                time.sleep(0.0005)
            engine.drain()
        self.found["timeline"] = [
            {"to": t.direction.name, "from": t.started - began, "until": t.ended - began,
             "bytes": t.nbytes}
            for t in tickets
        ]  # fmt: skip

    # -- what it must reach ------------------------------------------------------------------

    def judge(self) -> None:
        """Every aim beside what was found."""
        found, limits = self.found, self.found["limits_GB/s"]
        aims: list[dict[str, Any]] = []

        def aim(what: str, value: float | None, bound: float, *, most: bool = False) -> None:
            met = None if value is None else (value <= bound if most else value >= bound)
            aims.append({"aim": what, "found": value, "bound": bound, "met": met})

        def worst(rows: list[dict[str, Any]], key: str, **which: Any) -> float | None:
            chosen = [r[key] for r in rows if all(r[k] == v for k, v in which.items())]
            return min(chosen) if chosen else None

        for direction in Direction:
            to = direction.name
            rows = [r for r in found.get("sizes", []) if r["to"] == to and r["way"] == "auto"]
            large = [r["GB/s"] / limits[to] for r in rows if r["KiB"] >= 1024]
            aim(f"{to}: runs of 1 MiB and more, share of the limit", min(large, default=None), 0.95)
            share = [r["GB/s"] / limits[to] for r in rows if r["KiB"] == 256]
            aim(f"{to}: runs of 256 KiB, share of the limit", min(share, default=None), 0.90)
            small = worst(found.get("layers", []), "GB/s", to=to, way="auto")
            aim(f"{to}: pages under 28 KiB, GB/s", small, 40)
            probes = {r["load"]: r for r in found.get("probes", []) if r["to"] == to}
            paced = probes.get("device 4 MiB")
            aim(f"{to}: 4 KB copy beside swaps, p99 us", paced and paced["p99_us"], 150, most=True)
            kept = paced and paced["GB/s"] / limits[to]
            aim(f"{to}: bandwidth kept beside such copies", kept, 0.90)
            busy = [
                r["wall_GB/s"] / r["idle_GB/s"]
                for r in found.get("busy_main_thread", [])
                if r["to"] == to and r["pacing"] == "device"
            ]
            aim(f"{to}: share of bandwidth beside a busy main thread", min(busy, default=None), 0.8)
        aim("both directions at once, GB/s", found.get("both_ways_GB/s", {}).get("batch"), 80)
        submitting = found.get("submitting", {})
        aim(
            "10,000 runs beside the driver call, us",
            submitting.get("beside_the_driver_us"),
            1000,
            most=True,
        )
        aim(
            "engine's thread held per transfer, us",
            submitting.get("engine_thread_us"),
            50,
            most=True,
        )
        decode = [r["slowdown"] for r in found.get("decode", []) if r["load"].startswith("copy")]
        aim(
            "decode graph slows beside the copy engines by",
            max(decode, default=None),
            0.03,
            most=True,
        )
        aim("pinning, GiB/s", found["pinning"]["GiB/s"], 2)
        found["aims"] = aims


def provenance(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the figures were taken."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("kvswitch", "cuda-bindings", "cuda-core", "numba", "numpy", "torch")
    kernel_driver = Path("/proc/driver/nvidia/version")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "quick": options.quick,
        "gpu": context.name,
        "copy_engines": context.attribute("ASYNC_ENGINE_COUNT"),
        "cuda_driver": context.driver.version,
        "kernel_driver": kernel_driver.read_text().splitlines()[0]
        if kernel_driver.exists()
        else None,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{p: installed(p) for p in packages}},
    }


SECTIONS = (
    "limits", "sizes", "both_ways", "layers", "submitting", "probes", "busy", "decode", "timeline",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all sections; the figures, which have been written to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/cuda.json"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--memory", type=float, default=0, help="MiB on either side")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    options = parser.parse_args(arguments)
    bench = Bench(options)
    try:
        for section in SECTIONS:
            if section == "limits" or not options.only or section in options.only:
                print(f"{time.perf_counter() - bench.began:6.1f} s  {section}", flush=True)
                getattr(bench, section)()
                bench.save()
        bench.judge()
        bench.save()
    finally:
        bench.close()
    for aim in bench.found["aims"]:
        mark = {True: "met", False: "NOT met", None: "not measured"}[aim["met"]]
        value = "-" if aim["found"] is None else f"{aim['found']:.3g}"
        print(f"{mark:>12}  {aim['aim']}: {value} (aim {aim['bound']})")
    try:
        from cuda_plots import plot
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        plot(bench.found, bench.path.parent)
    return bench.found


if __name__ == "__main__":
    main()
