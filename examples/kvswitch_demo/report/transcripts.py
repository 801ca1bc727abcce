"""Conversations in readable text, with marks where they were switched out and in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from kvswitch_demo.results import RunResult, Switched, TurnRecord

__all__ = ["Absence", "Transcript", "Utterance", "transcripts"]


class Absence(msgspec.Struct, frozen=True):
    """A conversation was off the device for a while.

    Attributes
    ----------
    tokens : int
        Tokens of the answer that had been given by then.
    offset : int
        Characters of the answer's text before it.
    out, back : float
        When it was switched out and in, in seconds since the run began.
    """

    tokens: int
    offset: int
    out: float
    back: float


class Utterance(msgspec.Struct, frozen=True):
    """What one side said, and when the conversation was away meanwhile."""

    role: Literal["user", "assistant"]
    text: str
    absences: tuple[Absence, ...] = ()

    def pieces(self) -> Iterator[tuple[str, Absence | None]]:
        """The text cut where the conversation was switched: (text, absence after it)."""
        start = 0
        for absence in self.absences:
            yield self.text[start : absence.offset], absence
            start = absence.offset
        yield self.text[start:], None


class Transcript(msgspec.Struct, frozen=True):
    """One conversation."""

    conversation: int
    utterances: tuple[Utterance, ...]

    @property
    def absences(self) -> int:
        """How often it was switched out and in."""
        return sum(len(utterance.absences) for utterance in self.utterances)


def transcripts(
    run: RunResult,
    switched: Iterable[Switched],
    decode: Callable[[Sequence[int]], str],
    count: int = 3,
) -> list[Transcript]:
    """Write out the conversations that were switched most often.

    Parameters
    ----------
    run : RunResult
    switched : iterable of Switched
        In order of time; a switch-in without a switch-out before it (a new turn that finds its
        conversation idle) is left out.
    decode : callable
        From token ids to text, without control tokens.
    count : int
        How many conversations, at most.
    """
    away: dict[int, Switched] = {}
    absences: dict[int, list[tuple[Switched, Switched]]] = {}
    for event in switched:
        if event.out:
            away[event.conversation] = event
        elif before := away.pop(event.conversation, None):
            absences.setdefault(event.conversation, []).append((before, event))
    chosen = sorted(run.tokens, key=lambda c: (-len(absences.get(c, [])), c))[:count]
    return [_write_out(run, c, absences.get(c, []), decode) for c in chosen]


def _write_out(
    run: RunResult,
    conversation: int,
    absences: list[tuple[Switched, Switched]],
    decode: Callable[[Sequence[int]], str],
) -> Transcript:
    tokens = run.tokens[conversation]
    utterances = []
    position = 0
    for turn in _turns_of(run, conversation):
        first = position + turn.prompt_tokens
        last = first + len(turn.token_times)
        utterances.append(Utterance("user", _words(decode(tokens[position:first]))))
        answer = decode(tokens[first:last])
        marks = tuple(
            Absence(
                tokens=out.tokens - first,
                offset=_offset(answer, decode(tokens[first : out.tokens])),
                out=out.seconds,
                back=back.seconds,
            )
            for out, back in absences
            if first <= out.tokens <= last
        )
        utterances.append(Utterance("assistant", answer, marks))
        position = last
    return Transcript(conversation, tuple(utterances))


def _turns_of(run: RunResult, conversation: int) -> list[TurnRecord]:
    turns = [turn for turn in run.turns if turn.conversation == conversation]
    return sorted(turns, key=lambda turn: turn.turn)


def _words(text: str) -> str:
    """What the user said, without the names of roles that the chat format puts around it."""
    return text.strip().removesuffix("assistant").removeprefix("user\n").strip()


def _offset(text: str, start: str) -> int:
    """Length of `start` in `text`; its last character may be cut in the middle of its bytes."""
    start = start.rstrip("\N{REPLACEMENT CHARACTER}")
    return min(len(start), len(text))
