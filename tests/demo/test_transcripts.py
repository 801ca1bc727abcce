"""Conversations written out, with marks where they were switched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvswitch import SwapStats
from kvswitch_demo.report.transcripts import Absence, Utterance, transcripts
from kvswitch_demo.results import RunResult, Switched, TurnRecord


def decode(tokens: Sequence[int]) -> str:
    """Each token is a byte."""
    return bytes(tokens).decode(errors="replace")


def run_of(*conversations: list[tuple[str, str]]) -> RunResult:
    """Conversations of (what the user says, the answer), one byte a token."""
    run = RunResult("kvswitch", 9.0, [], [], [], SwapStats(), 1, 0, 0.0, 0.0, {})
    for number, turns in enumerate(conversations):
        run.tokens[number] = []
        for turn, (said, answer) in enumerate(turns):
            prompt = f"\nuser\n{said}\nassistant\n".encode()
            times = [float(i) for i in range(len(answer.encode()))]
            run.turns.append(TurnRecord(number, turn, 0.0, len(prompt), times))
            run.tokens[number] += [*prompt, *answer.encode()]
    return run


def test_turns_become_what_the_user_said_and_the_answer() -> None:
    run = run_of([("Hello", "Hi there"), ("Is it late?", "No")])
    run.turns.reverse()  # as they end, not as they come
    (written,) = transcripts(run, [], decode)
    assert [(u.role, u.text) for u in written.utterances] == [
        ("user", "Hello"),
        ("assistant", "Hi there"),
        ("user", "Is it late?"),
        ("assistant", "No"),
    ]
    assert written.absences == 0


def test_an_absence_is_marked_where_the_answer_was_interrupted() -> None:
    run = run_of([("Hello", "Hi there"), ("Is it late?", "Not yet")])
    first = len("\nuser\nHello\nassistant\n")
    second = first + len("Hi there\nuser\nIs it late?\nassistant\n")
    events = [
        Switched(0, True, first + 3, 1.0),
        Switched(0, False, first + 3, 2.5),
        Switched(0, False, second, 3.0),  # the next turn finds it idle: it was not switched out
        Switched(0, True, second, 4.0),  # before its first token
        Switched(0, False, second, 4.5),
        Switched(0, True, second + 7, 9.0),  # and it never came back
    ]
    (written,) = transcripts(run, events, decode)
    answers = [u for u in written.utterances if u.role == "assistant"]
    assert answers[0].absences == (Absence(tokens=3, offset=3, out=1.0, back=2.5),)
    assert answers[1].absences == (Absence(tokens=0, offset=0, out=4.0, back=4.5),)
    assert [text for text, _ in answers[0].pieces()] == ["Hi ", "there"]


def test_a_character_is_not_cut_where_a_token_ends_within_it() -> None:
    run = run_of([("Hello", "a\N{SNOWMAN}b")])
    first = len("\nuser\nHello\nassistant\n")
    events = [Switched(0, True, first + 2, 1.0), Switched(0, False, first + 2, 2.0)]
    (written,) = transcripts(run, events, decode)
    assert [t for t, _ in written.utterances[1].pieces()] == ["a", "\N{SNOWMAN}b"]


def test_the_most_switched_conversations_are_chosen() -> None:
    run = run_of(*[[("Hello", "Hi there")]] * 5)
    first = len("\nuser\nHello\nassistant\n")
    events = [
        Switched(number, out, first, 1.0)
        for number, times in ((4, 2), (1, 3), (2, 1))
        for _ in range(times)
        for out in (True, False)
    ]
    assert [t.conversation for t in transcripts(run, events, decode)] == [1, 4, 2]
    assert [t.conversation for t in transcripts(run, events, decode, count=1)] == [1]


@pytest.mark.parametrize("text", ["", "abc"])
def test_pieces_make_up_the_text(text: str) -> None:
    whole = Utterance("assistant", text, (Absence(0, 0, 0, 1), Absence(1, len(text), 1, 2)))
    assert "".join(piece for piece, _ in whole.pieces()) == text
    assert [absence for _, absence in whole.pieces()] == [*whole.absences, None]
