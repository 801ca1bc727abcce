from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch.scheduling import PriorityTrace

KINDS = pytest.mark.parametrize("kind", [PriorityTrace.random, PriorityTrace.markov])

RANDOM = [[7, 7, 1, 3, 7, 5], [0, 4, 3, 5, 2, 6]]
MARKOV = [[7, 7, 1, 3, 7, 5], [7, 4, 3, 3, 2, 5], [7, 4, 3, 3, 2, 0], [7, 4, 7, 5, 7, 1]]


def agreement(trace: PriorityTrace) -> float:
    return float((trace.levels[1:] == trace.levels[:-1]).mean())


@KINDS
def test_every_level_is_equally_likely_in_every_epoch(kind: Callable[..., PriorityTrace]) -> None:
    levels = kind(3, sequences=40_000, epochs=12, levels=8).levels
    for row in levels:
        share = np.bincount(row, minlength=8) / row.size
        # 40,000 draws: five standard deviations of a share of 1/8 are 0.008.
        np.testing.assert_allclose(share, 1 / 8, atol=0.008)


def test_markov_keeps_a_level_with_the_given_probability() -> None:
    for keep in (0.0, 0.5, 0.9):
        trace = PriorityTrace.markov(5, sequences=2_000, epochs=100, levels=8, keep=keep)
        assert agreement(trace) == pytest.approx(keep + (1 - keep) / 8, abs=0.005)


def test_markov_that_keeps_everything_never_changes() -> None:
    trace = PriorityTrace.markov(5, sequences=50, epochs=20, keep=1.0)
    assert (trace.levels == trace.levels[0]).all()
    assert len(set(trace.levels[0].tolist())) > 1


def test_random_keeps_nothing() -> None:
    trace = PriorityTrace.random(5, sequences=2_000, epochs=100, levels=8)
    assert agreement(trace) == pytest.approx(1 / 8, abs=0.005)


def test_neighbouring_sequences_are_independent() -> None:
    levels = PriorityTrace.markov(5, sequences=2_000, epochs=500, levels=2).levels.astype(float)
    changed = levels[1:] != levels[:-1]
    together = (changed[:, 1:] & changed[:, :-1]).mean()
    assert together == pytest.approx(changed.mean() ** 2, abs=0.001)


@KINDS
def test_the_seed_alone_makes_the_trace(kind: Callable[..., PriorityTrace]) -> None:
    first, again, other = kind(7, 30, 40), kind(7, 30, 40), kind(8, 30, 40)
    np.testing.assert_array_equal(first.levels, again.levels)
    assert (first.levels != other.levels).any()


def test_traces_do_not_change_between_versions() -> None:
    """Published figures name a seed; what numpy's PCG64 makes of it is fixed here."""
    assert PriorityTrace.random(1, 6, 2).levels.tolist() == RANDOM
    assert PriorityTrace.markov(1, 6, 4, keep=0.5).levels.tolist() == MARKOV


@KINDS
def test_levels_start_at_zero_and_end_below_their_number(
    kind: Callable[..., PriorityTrace],
) -> None:
    assert set(kind(0, 200, 20, levels=3).levels.flat) == {0, 1, 2}
    assert kind(0, 2000, 20, levels=256).levels.max() == 255


def test_sizes_are_those_asked_for() -> None:
    trace = PriorityTrace.random(0, sequences=5, epochs=3)
    assert (trace.epochs, trace.sequences, trace.levels.shape) == (3, 5, (3, 5))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"sequences": 0}, "0 sequences"),
        ({"epochs": 0}, "0 epochs"),
        ({"levels": 0}, "levels=0"),
        ({"levels": 257}, "levels=257"),
        ({"seed": -1}, "seed=-1"),
        ({"keep": -0.1}, "keep=-0.1"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"keep": float("nan")}, "keep=nan"),
    ],
)
def test_sizes_out_of_range_are_config_errors(arguments: dict[str, float], what: str) -> None:
    settings = {"seed": 0, "sequences": 5, "epochs": 5} | arguments
    with pytest.raises(ConfigError, match=what):
        PriorityTrace.markov(**settings)  # type: ignore[arg-type]


def test_a_recorded_trace_is_a_read_only_copy() -> None:
    levels = np.array([[1, 2]], np.uint8)
    trace = PriorityTrace(levels)
    levels[0, 0] = 9
    assert trace.levels.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="read-only"):
        trace.levels[0, 0] = 9


@pytest.mark.parametrize(
    "levels",
    [np.zeros((2, 2), np.int64), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)],
    ids=["type", "shape", "empty"],
)
def test_a_recorded_trace_must_be_a_table_of_bytes(levels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"levels must be uint8 \[epochs, sequences\]"):
        PriorityTrace(levels)


@pytest.mark.parametrize("name", ["trace.npz", "a trace with no extension"])
def test_a_saved_trace_loads_as_it_was(tmp_path: Path, name: str) -> None:
    trace = PriorityTrace.markov(2, 30, 40)
    trace.save(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(PriorityTrace.load(tmp_path / name).levels, trace.levels)


def write_npy(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


BYTES = np.zeros((2, 2), np.uint8)
MALFORMED: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"levels: 1 2 3"),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04 not a zip archive"),
    "header": lambda path: path.write_bytes(b"\x93NUMPY"),
    "npy": lambda path: write_npy(path, BYTES),
    "field": lambda path: write_npz(path, other=BYTES),
    "pickled": lambda path: write_npz(path, levels=np.array([[None]])),
    "type": lambda path: write_npz(path, levels=BYTES.astype(float)),
    "shape": lambda path: write_npz(path, levels=BYTES[0]),
    "size": lambda path: write_npz(path, levels=BYTES[:, :0]),
}


@pytest.mark.parametrize("write", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_a_config_error_naming_file_and_field(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(ConfigError, match=r"bad\.npz.*levels"):
        PriorityTrace.load(path)


def test_a_damaged_file_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    PriorityTrace.random(0, 100, 100).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(50) + data[250:])
    with pytest.raises(ConfigError, match=r"bad\.npz.*levels"):
        PriorityTrace.load(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"bad\.npz.*levels"):
        PriorityTrace.load(path)
