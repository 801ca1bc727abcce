"""Who asks for what and when: multi-turn conversations in tokens, and files they are read from."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from kvswitch.errors import ConfigError

__all__ = [
    "Lengths",
    "Reading",
    "Script",
    "Workload",
    "load_azure",
    "load_lengths",
    "load_mooncake",
    "load_sharegpt",
    "load_trace",
    "sample",
]

Turns = Sequence[tuple[int, int]]
"""(prompt, output) tokens of each turn; the prompt without what was said before."""

Lengths = list[list[tuple[int, int]]]
"""Turns of each conversation."""

Reading = Literal["conversations", "turns"]
"""What "1 request a second" counts: conversations that begin, or turns."""


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation as it will go.

    Attributes
    ----------
    arrival : float
        When its first turn comes, in seconds.
    turns : sequence of (int, int)
        Prompt and output tokens of each turn, both at least 1.
    pauses : list of float
        Seconds from the end of a turn to the next; one fewer than turns.
    due : list of float or None
        When turns came according to a trace: the next turn begins then, or when the one before it
        has ended, whichever is later. Then `pauses` is empty.
    """

    arrival: float
    turns: Turns
    pauses: Sequence[float] = ()
    due: Sequence[float] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the whole conversation."""
        return sum(prompt + output for prompt, output in self.turns)

    def next_turn(self, turn: int, ended: float) -> float:
        """When turn number `turn` comes, if the one before it has `ended`."""
        if self.due is not None:
            return max(ended, self.due[turn])
        return ended + self.pauses[turn - 1]


@dataclass(frozen=True)
class Workload:
    """Conversations to be served.

    Attributes
    ----------
    excluded : int
        How many were left out: they exceed the model's context.
    single : int
        How many of those to be drawn from have one turn, and were not drawn.
    drawn : bool
        Whether conversations were drawn, and their times with them.
    """

    name: str
    scripts: list[Script]
    excluded: int = 0
    single: int = 0
    drawn: bool = False

    @property
    def turns(self) -> int:
        """Turns in all."""
        return sum(len(script.turns) for script in self.scripts)

    @property
    def output_tokens(self) -> int:
        """Tokens to be generated in all."""
        return sum(output for script in self.scripts for _, output in script.turns)

    @property
    def span(self) -> float:
        """Seconds in which conversations begin."""
        return max(script.arrival for script in self.scripts)

    def offered(self) -> float:
        """Output tokens that are asked for per second of arrivals."""
        return self.output_tokens / self.span if self.span else float("inf")


def sample(
    lengths: Lengths,
    *,
    seed: int,
    count: int,
    rate: float,
    think: float,
    context: int,
    reading: Reading = "conversations",
    name: str = "ShareGPT",
) -> Workload:
    """Draw multi-turn conversations with Poisson arrivals, lengths unaltered.

    Parameters
    ----------
    lengths : Lengths
    seed : int
        The same arguments give the same conversations everywhere.
    count : int
        Conversations to draw, before those over `context` are left out: so the draw does not
        depend on the model.
    rate : float
        Conversations that begin, or turns, a second (see `reading`), of those that are not left
        out.
    think : float
        Mean seconds from an answer to the next turn, exponentially distributed.
    context : int
        Tokens that the model can hold.
    reading : {"conversations", "turns"}
        What `rate` counts. With "turns", conversations begin so seldom that turns, not counting
        queueing, come at that rate.

    Raises
    ------
    ConfigError
        A number is out of its range, or no conversation is left.
    """
    for what, value in (("count", count), ("rate", rate), ("context", context)):
        if value <= 0:
            raise ConfigError(f"{what} must be more than 0, got {value}")
    if think < 0:
        raise ConfigError(f"think must not be negative, got {think}")
    many = [turns for turns in lengths if len(turns) > 1]
    if not many:
        raise ConfigError(f"{name}: there is no conversation of several turns")
    rng = np.random.default_rng(seed)
    picked = rng.choice(len(many), count, replace=len(many) < count).tolist()
    gaps = rng.exponential(1.0, count)
    chosen = [[(max(1, p), max(1, o)) for p, o in many[pick]] for pick in picked]
    thinks = [rng.exponential(1.0, len(turns) - 1) * think for turns in chosen]
    fit = [i for i, turns in enumerate(chosen) if sum(map(sum, turns)) <= context]
    _check_some(name, fit, context)
    if reading == "turns":
        rate /= sum(len(chosen[i]) for i in fit) / len(fit)
    arrivals = np.cumsum(gaps[fit]) / rate
    scripts = [
        Script(at, chosen[i], thinks[i].tolist())
        for at, i in zip(arrivals.tolist(), fit, strict=True)
    ]
    single = len(lengths) - len(many)
    return Workload(name, scripts, excluded=count - len(fit), single=single, drawn=True)


def _fitting(name: str, scripts: list[Script], context: int) -> Workload:
    fit = [script for script in scripts if script.tokens <= context]
    _check_some(name, fit, context)
    return Workload(name, fit, excluded=len(scripts) - len(fit))


def _check_some(name: str, fit: Sequence[object], context: int) -> None:
    if not fit:
        raise ConfigError(f"{name}: every conversation exceeds the context of {context} tokens")


# -- files ---------------------------------------------------------------------------------------


def load_lengths(path: Path | None = None) -> Lengths:
    """Read conversation lengths: one (prompt tokens, output tokens) a turn.

    Parameters
    ----------
    path : Path, optional
        A CSV file with columns conversation, turn, prompt_tokens, output_tokens, may be gzipped;
        by default the ShareGPT lengths that come with the package.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is not what it should be; names the line.
    """
    source = path or files("kvswitch.sim") / "data" / "sharegpt_turns.csv.gz"
    try:
        data = source.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        rows = csv.DictReader(text.decode().splitlines())
        conversations: dict[str, list[tuple[int, int]]] = {}
        for row in rows:
            lengths = _count(row, "prompt_tokens"), _count(row, "output_tokens")
            conversations.setdefault(row["conversation"], []).append(lengths)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read conversation lengths {source}: {error}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"{source}, line {rows.line_num}: expected conversation, turn, prompt_tokens, "
            f"output_tokens ({error})"
        ) from error
    if not conversations:
        raise ConfigError(f"{source}: there is no conversation in it")
    return list(conversations.values())


_WORD_TOKENS = 1.3
"""Tokens of an English word, about, where no tokenizer counts them."""


def load_sharegpt(path: Path) -> Lengths:
    """Read a ShareGPT file: a JSON list of {"conversations": [{"from": ..., "value": ...}]}.

    There is no tokenizer here: a word counts as 1.3 tokens. What a human says until an answer comes
    is one prompt; conversations without an answer are left out.

    Raises
    ------
    ConfigError
        The file cannot be read, or an entry is not what it should be; names the entry and field.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read ShareGPT conversations {path}: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: expected a list of conversations")
    conversations = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        messages = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(messages, list):
            raise ConfigError(f"{where}: 'conversations' must be a list of messages")
        if turns := list(_turns_of(messages, where)):
            conversations.append(turns)
    if not conversations:
        raise ConfigError(f"{path}: there is no conversation with an answer in it")
    return conversations


def _turns_of(messages: Iterable[Any], where: str) -> Iterator[tuple[int, int]]:
    prompt = 0
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ConfigError(f"{where}, message {number}: 'value' must be a text")
        tokens = max(1, round(len(message["value"].split()) * _WORD_TOKENS))
        if message.get("from") in ("gpt", "assistant", "chatgpt", "bing", "bard"):
            if prompt:
                yield prompt, tokens
            prompt = 0
        else:
            prompt += tokens


def load_azure(path: Path, context: int) -> Workload:
    """Read an Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens).

    It has no conversation ids, so every request is a conversation of one turn.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is not what it should be; names line and field.
    """
    scripts: list[Script] = []
    begin: datetime | None = None
    for line, row in _csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            time = _moment(row["TIMESTAMP"])
            tokens = _count(row, "ContextTokens"), _count(row, "GeneratedTokens")
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: {error}") from error
        begin = begin or time
        at = (time - begin).total_seconds()
        if scripts and at < scripts[-1].arrival:
            raise ConfigError(f"{path}, line {line}: TIMESTAMP lies before the line above it")
        scripts.append(Script(at, [(max(1, tokens[0]), max(1, tokens[1]))]))
    if not scripts:
        raise ConfigError(f"{path}: there is no request in it")
    return _fitting(path.name, scripts, context)


def _count(row: Mapping[str, str], column: str) -> int:
    try:
        count = int(row[column])
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError(f"{column} must be a count, got {row[column]!r}")
    return count


def _moment(text: str) -> datetime:
    """A time as in Azure's traces: with seven digits behind the point, and perhaps a zone (UTC)."""
    match = re.fullmatch(r"([-\d]+[ T][:\d]+(?:\.\d{1,6})?)\d*(?:Z|\+00:?00)?", text.strip())
    try:
        return datetime.fromisoformat(match[1] if match else text).replace(tzinfo=None)
    except ValueError as error:
        raise ValueError(f"TIMESTAMP: {error}") from error


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        named = rows.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    missing = [column for column in columns if column not in named]
    if missing:
        raise ConfigError(f"{path}, line 1: there is no column {missing[0]}")
    try:
        for row in rows:
            if any(row[column] is None for column in columns):
                raise ConfigError(f"{path}, line {rows.line_num}: expected {', '.join(columns)}")
            yield rows.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path}, line {rows.line_num}: {error}") from error


class _MooncakeRequest(msgspec.Struct):
    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


_SHARED_ROOT = 2
"""Blocks that a request must share with an earlier one to continue its conversation: the first is
the same system prompt in all of them."""


def load_mooncake(path: Path, context: int) -> Workload:
    """Read a Mooncake trace (JSON lines: timestamp in ms, lengths, hash ids of 512-token blocks).

    Times count from the first request. A request continues the conversation whose last request's
    blocks, all but the last (partial) one, its own begin with; its prompt is then what lies behind
    that request's tokens.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line is not what it should be; names line and field.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    ending: dict[tuple[int, ...], list[tuple[float, int, int]]] = {}
    conversations: list[list[tuple[float, int, int]]] = []
    first = last = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _mooncake_request(path, number, line)
        first = request.timestamp if first is None else first
        if last is not None and request.timestamp < last:
            raise ConfigError(f"{path}, line {number}: timestamp lies before the line above it")
        last = request.timestamp
        ids = tuple(request.hash_ids)
        begun = None
        for size in range(len(ids), _SHARED_ROOT - 1, -1):
            begun = ending.pop(ids[:size], None)
            if begun is not None:
                break
        if begun is None:
            begun = []
            conversations.append(begun)
        at = (request.timestamp - first) / 1000
        begun.append((at, request.input_length, request.output_length))
        ending[ids[:-1]] = begun
    if not conversations:
        raise ConfigError(f"{path}: there is no request in it")
    return _fitting(path.name, [_mooncake_script(requests) for requests in conversations], context)


def _mooncake_request(path: Path, number: int, line: bytes) -> _MooncakeRequest:
    try:
        request = msgspec.json.decode(line, type=_MooncakeRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}, line {number}: {error}") from error
    for field in ("timestamp", "input_length", "output_length"):
        if getattr(request, field) < 0:
            raise ConfigError(f"{path}, line {number}: {field} must not be negative")
    return request


def _mooncake_script(requests: list[tuple[float, int, int]]) -> Script:
    turns, length = [], 0
    for _, tokens, output in requests:
        prompt = max(1, tokens - length)
        turns.append((prompt, max(1, output)))
        length += prompt + max(1, output)
    return Script(requests[0][0], turns, due=[at for at, _, _ in requests])


def load_trace(
    path: Path, *, context: int, seed: int, count: int, rate: float, think: float
) -> Workload:
    """Read a workload of any kind known here, told apart by name and content.

    Mooncake (.jsonl) and Azure (.csv with TIMESTAMP) traces have their own times. Of ShareGPT
    (.json) and lengths (.csv, .csv.gz) conversations are drawn, see `sample`.

    Raises
    ------
    ConfigError
        The file is of no kind known, or malformed.
    """
    if path.suffix == ".jsonl":
        return load_mooncake(path, context)
    if path.suffix == ".csv":
        try:
            with path.open() as file:
                head = file.readline()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if "TIMESTAMP" in head:
            return load_azure(path, context)
    elif path.suffix not in (".json", ".gz"):
        raise ConfigError(
            f"{path}: what is it? Known are Mooncake (.jsonl), Azure (.csv), ShareGPT (.json), and "
            "lengths (.csv, .csv.gz with conversation, turn, prompt_tokens, output_tokens)"
        )
    lengths = load_sharegpt(path) if path.suffix == ".json" else load_lengths(path)
    return sample(
        lengths,
        seed=seed,
        count=count,
        rate=rate,
        think=think,
        context=context,
        name=path.name,
    )
