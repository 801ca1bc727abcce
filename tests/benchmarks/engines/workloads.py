"""Workloads with the lengths of real ShareGPT conversations, and random tokens."""

from __future__ import annotations

import argparse
import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvswitch.sim

_LENGTHS = Path(kvswitch.sim.__file__).parent / "data/sharegpt_turns.csv.gz"
_VOCABULARY = 48000


@dataclass(frozen=True)
class Item:
    """A request of the workload.

    Attributes
    ----------
    name : str
    arrival : float
        Seconds after the start; or, with `after`, after that request has ended.
    prompt : list of int
    output : int
        Tokens to generate.
    after : str or None
        Conversation: comes when that one has ended, its prompt and output before its own.
    """

    name: str
    arrival: float
    prompt: list[int]
    output: int
    after: str | None = None


def items(options: argparse.Namespace, seed: int) -> list[Item]:
    """Return the workload that a command line asks for."""
    if options.workload == "turns":
        return conversations(seed)
    if options.workload == "short":
        return single_turns(seed, options.requests, options.rate, (60, 200), (30, 60))
    return single_turns(seed, options.requests, options.rate)


def single_turns(
    seed: int,
    requests: int,
    rate: float,
    prompts: tuple[int, int] = (200, 1000),
    outputs: tuple[int, int] = (40, 250),
) -> list[Item]:
    """Requests with so many prompt and output tokens, Poisson arrivals."""
    rng = np.random.default_rng(seed)
    lengths = [
        (prompt, output)
        for turn, prompt, output in _turns()
        if turn == 0 and prompts[0] <= prompt <= prompts[1] and outputs[0] <= output <= outputs[1]
    ]
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    chosen = rng.integers(0, len(lengths), requests)
    return [
        Item(f"r{i}", float(arrivals[i]), _prompt(rng, lengths[k][0]), lengths[k][1])
        for i, k in enumerate(chosen.tolist())
    ]


def conversations(seed: int, chats: int = 12, turns: int = 3, pause: float = 12.0) -> list[Item]:
    """Chats whose turns come back when others have taken the memory."""
    rng = np.random.default_rng(seed)
    lengths = [
        (prompt, output)
        for _, prompt, output in _turns()
        if 60 <= prompt <= 300 and 30 <= output <= 100
    ]
    turns_of_all = []
    for chat in range(chats):
        for turn in range(turns):
            prompt, output = lengths[rng.integers(0, len(lengths))]
            turns_of_all.append(
                Item(
                    f"c{chat}t{turn}",
                    float(rng.uniform(0, chats)) if turn == 0 else float(rng.exponential(pause)),
                    _prompt(rng, prompt),
                    output,
                    f"c{chat}t{turn - 1}" if turn else None,
                )
            )
    return turns_of_all


def _turns() -> list[tuple[int, int, int]]:
    with gzip.open(_LENGTHS, "rt") as file:
        return [
            (int(row["turn"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        ]


def _prompt(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(t) for t in rng.integers(3, _VOCABULARY, tokens)]
