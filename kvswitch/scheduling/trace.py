"""Priority traces: precomputed priorities that every system compared shares [paper 4.2]."""

from __future__ import annotations

import zipfile
import zlib
from os import PathLike
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError

__all__ = ["PriorityTrace"]

Levels: TypeAlias = npt.NDArray[np.uint8]


class PriorityTrace:
    """The priority level of each sequence in each epoch.

    Parameters
    ----------
    levels : uint8 array, shape [epochs, sequences]
        Level 0 is the lowest. The trace keeps a read-only copy.

    Raises
    ------
    ConfigError
        If `levels` is not such an array, or has no epoch or no sequence.
    """

    def __init__(self, levels: Levels) -> None:
        _check_levels(levels, "levels")
        self.levels: Levels = levels.copy()
        self.levels.flags.writeable = False

    @property
    def epochs(self) -> int:
        """Number of epochs; a trace starts anew at its end."""
        return len(self.levels)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.levels.shape[1])

    @classmethod
    def random(cls, seed: int, sequences: int, epochs: int, levels: int = 8) -> PriorityTrace:
        """Draw every level anew and uniformly: no sequence keeps anything [paper: Random].

        Parameters
        ----------
        seed : int
            The same seed and sizes give the same trace on every machine.
        sequences, epochs : int
        levels : int
            Number of levels, 1 to 256.

        Raises
        ------
        ConfigError
            If the seed or a size is out of range.
        """
        return cls(_draw(_generator(seed), sequences, epochs, levels))

    @classmethod
    def markov(
        cls, seed: int, sequences: int, epochs: int, levels: int = 8, *, keep: float = 0.9
    ) -> PriorityTrace:
        """Let each sequence keep its level with probability `keep`, else draw it anew.

        Temporal locality [paper: Markov] with the marginal distribution of `random`. A new draw
        may hit the old level, so two neighbouring epochs agree with probability
        `keep + (1 - keep) / levels`.

        Parameters
        ----------
        seed, sequences, epochs, levels
            As for `random`.
        keep : float
            0 (the same as Random) to 1 (levels never change).

        Raises
        ------
        ConfigError
            If the seed, a size or `keep` is out of range.
        """
        if not 0.0 <= keep <= 1.0:
            raise ConfigError(f"keep={keep} is no probability: give a number from 0 to 1")
        generator = _generator(seed)
        drawn = _draw(generator, sequences, epochs, levels)
        anew = generator.random((epochs, sequences)) >= keep
        # For each cell, the last epoch at which that sequence drew; all draw in the first.
        source = np.maximum.accumulate(np.where(anew, np.arange(epochs)[:, None], 0), axis=0)
        return cls(np.take_along_axis(drawn, source, axis=0))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace to `path`, a compressed .npz file with one array, `levels`."""
        # numpy appends .npz to a path that lacks it, but leaves an open file alone.
        with open(path, "wb") as file:
            np.savez_compressed(file, levels=self.levels)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> PriorityTrace:
        """Read a trace written by `save`.

        Raises
        ------
        ConfigError
            If the file cannot be read or is no trace; it names the file and what is wrong in it.
        """
        try:
            # numpy leaves a file it opened itself open, if it is no archive.
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as fields:
                levels = fields["levels"]
        except KeyError:
            raise ConfigError(f"{path}: no array levels: not a priority trace") from None
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{path}: cannot read levels of a priority trace: {error}") from error
        _check_levels(levels, f"{path}: levels")
        return cls(levels)


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise ConfigError(f"seed={seed}: give 0 or more")
    return np.random.Generator(np.random.PCG64(seed))


def _draw(generator: np.random.Generator, sequences: int, epochs: int, levels: int) -> Levels:
    if sequences < 1 or epochs < 1:
        raise ConfigError(
            f"a priority trace of {epochs} epochs of {sequences} sequences is empty: "
            "both must be 1 or more"
        )
    if not 1 <= levels <= 256:
        raise ConfigError(f"levels={levels}: a level is one byte, so give 1 to 256 levels")
    return generator.integers(0, levels, (epochs, sequences), dtype=np.uint8)


def _check_levels(levels: Levels, name: str) -> None:
    if levels.dtype != np.uint8 or levels.ndim != 2 or not levels.size:
        raise ConfigError(
            f"{name} must be uint8 [epochs, sequences], neither of them 0; "
            f"got {levels.dtype} {list(levels.shape)}"
        )
