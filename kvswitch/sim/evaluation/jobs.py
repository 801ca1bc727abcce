"""Simulations to be run, run once: results are kept by what they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import msgspec

from kvswitch.errors import ConfigError
from kvswitch.sim.metrics import Result
from kvswitch.sim.profiles import Engine, Link, load_profiles
from kvswitch.sim.run import Machine, Pattern, Priorities, simulate
from kvswitch.sim.systems import find_system
from kvswitch.sim.workload import Lengths, Reading, load_lengths, sample

__all__ = ["Job", "Results", "code_digest", "run_job", "run_jobs"]

_SETTING = load_profiles().setting
_P = TypeVar("_P", Engine, Link)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation; by default the paper's setting (kvswitch/sim/data/profiles.toml).

    Attributes
    ----------
    system, gpu, model : str
    pattern, epoch, seconds, keep
        See `Priorities`.
    reading, conversations, rate, think
        See `kvswitch.sim.workload.sample`.
    seed : int
    host_memory : float
        GB.
    first_group : int
        Blocks.
    headroom : float or None
        In place of the system's.
    engine, link : tuple of (str, float)
        Constants in place of those of the profiles.
    """

    system: str
    gpu: str = "a10"
    model: str = "llama-8b"
    pattern: Pattern = "markov"
    epoch: int = 25
    seconds: float | None = None
    keep: float = _SETTING.keep
    reading: Reading = "turns"
    conversations: int = _SETTING.conversations
    rate: float = _SETTING.rate
    think: float = _SETTING.think
    seed: int = 0
    host_memory: float = _SETTING.host_memory
    first_group: int = 60
    headroom: float | None = None
    engine: tuple[tuple[str, float], ...] = ()
    link: tuple[tuple[str, float], ...] = ()

    def machine(self) -> Machine:
        """What serves."""
        machine = Machine.of(self.gpu, self.model)
        return replace(
            machine,
            engine=_changed(machine.engine, self.engine),
            link=_changed(machine.link, self.link),
            host_memory=self.host_memory,
            first_group=self.first_group,
        )

    @property
    def key(self) -> str:
        """Name of its result: of the job, the code and the data that decide about it."""
        return hashlib.sha256(msgspec.json.encode(self) + code_digest().encode()).hexdigest()[:32]


def _changed(profile: _P, constants: tuple[tuple[str, float], ...]) -> _P:
    fields = {name: type(getattr(profile, name))(value) for name, value in constants}
    return msgspec.structs.replace(profile, **fields)


# What results depend on, beside the job: the core, less what only engines use, and the simulator.
_CORE = ("blocks", "copies", "switch", "scheduling")
_FOR_ENGINES = ("counters.py", "engine_pool.py", "facade.py", "ranks.py", "worker.py")
_CORE_FILES = ("messages.py", "transfer/plan.py", "sim/evaluation/jobs.py")
_SIMULATOR = (
    *("profiles", "cost", "link", "workload", "systems"),
    *("memory", "prefix_cache", "engine", "metrics", "run"),
)
_DATA = ("profiles.toml", "sharegpt_turns.csv.gz")


@cache
def code_digest() -> str:
    """Digest of the code and the data that decide about results."""
    root = files("kvswitch")
    paths = [
        file
        for folder in _CORE
        for file in sorted((root / folder).iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".py") and file.name not in _FOR_ENGINES
    ]
    paths += [root / name for name in _CORE_FILES]
    paths += [root / "sim" / f"{name}.py" for name in _SIMULATOR]
    paths += [root / "sim" / "data" / name for name in _DATA]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _lengths() -> Lengths:
    return load_lengths()


def run_job(job: Job) -> Result:
    """Run one simulation."""
    machine = job.machine()
    workload = sample(
        _lengths(),
        seed=job.seed,
        count=job.conversations,
        rate=job.rate,
        think=job.think,
        context=machine.model.context,
        reading=job.reading,
    )
    system = find_system(job.system)
    if job.headroom is not None:
        system = replace(system, headroom=job.headroom)
    priorities = Priorities(
        job.pattern, job.epoch, job.seconds, levels=_SETTING.levels, keep=job.keep
    )
    return simulate(system, workload.scripts, machine, priorities, seed=job.seed)


class Results:
    """Results by job, in a directory of files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[Job, Result] = {}

    def get(self, job: Job) -> Result | None:
        """Return the result of a job, None if it has not been run."""
        if job not in self._known:
            try:
                data = (self._directory / f"{job.key}.json").read_bytes()
                self._known[job] = msgspec.json.decode(data, type=Result)
            except (OSError, msgspec.DecodeError):
                return None
        return self._known[job]

    def put(self, job: Job, result: Result) -> None:
        """Keep a result."""
        self._known[job] = result
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._directory / f"{job.key}.json"
            part = file.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(result))
            part.replace(file)
        except OSError as error:
            raise ConfigError(f"cannot keep results in {self._directory}: {error}") from error

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Jobs that have not been run, each once."""
        return [job for job in dict.fromkeys(jobs) if self.get(job) is None]


def run_jobs(
    jobs: Iterable[Job],
    results: Results,
    processes: int,
    on_done: Callable[[Job, Result], None] = lambda job, result: None,
) -> None:
    """Run what is missing, a process for each of `processes` simulations at a time."""
    missing = results.missing(jobs)
    if processes <= 1 or len(missing) < 2:
        for job in missing:
            result = run_job(job)
            results.put(job, result)
            on_done(job, result)
        return
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(run_job, job): job for job in missing}
        try:
            for future in as_completed(futures):
                job, result = futures[future], future.result()
                results.put(job, result)
                on_done(job, result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
