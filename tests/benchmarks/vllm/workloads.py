"""Workloads with the lengths of real ShareGPT conversations, and random tokens."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
from engine import Item

_LENGTHS = Path(__file__).parents[3] / "kvswitch/sim/data/sharegpt_turns.csv.gz"
_VOCABULARY = 48000


def single_turns(seed: int, requests: int = 50, rate: float = 1.5) -> list[Item]:
    """Requests of 200 to 1000 prompt and 40 to 250 output tokens, Poisson arrivals."""
    rng = np.random.default_rng(seed)
    lengths = [
        (prompt, output)
        for turn, prompt, output in _turns()
        if turn == 0 and 200 <= prompt <= 1000 and 40 <= output <= 250
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
    items = []
    for chat in range(chats):
        for turn in range(turns):
            prompt, output = lengths[rng.integers(0, len(lengths))]
            items.append(
                Item(
                    f"c{chat}t{turn}",
                    float(rng.uniform(0, chats)) if turn == 0 else float(rng.exponential(pause)),
                    _prompt(rng, prompt),
                    output,
                    f"c{chat}t{turn - 1}" if turn else None,
                )
            )
    return items


def _turns() -> list[tuple[int, int, int]]:
    with gzip.open(_LENGTHS, "rt") as file:
        return [
            (int(row["turn"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(line for line in file if not line.startswith("#"))
        ]


def _prompt(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(t) for t in rng.integers(3, _VOCABULARY, tokens)]
