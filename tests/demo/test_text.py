"""User turns of exact length: readable, different from each other, the same for the same seed."""

from __future__ import annotations

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

from kvswitch_demo.text import PromptText
from kvswitch_demo.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> PromptText:
    return PromptText(tokenizer, seed=0)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("tokens", [*range(1, 50), 64, 128, 777, 5000])
def test_a_turn_has_exactly_the_tokens_asked_for(
    prompt: PromptText, tokens: int, turn: int
) -> None:
    assert all(len(prompt(conversation, turn, tokens)) == tokens for conversation in range(20))


def test_the_same_seed_says_the_same_in_any_order(tokenizer: Tokenizer) -> None:
    places = [(c, t, n) for c in range(5) for t in range(3) for n in (7, 20, 100)]
    forth, back = PromptText(tokenizer, seed=1), PromptText(tokenizer, seed=1)
    said = {place: forth(*place) for place in places}
    assert said == {place: back(*place) for place in reversed(places)}
    other = PromptText(tokenizer, seed=2)
    assert said != {place: other(*place) for place in places}


@pytest.mark.parametrize(
    ("tokens", "least"), [(20, 25), (26, 25), (36, 25), (48, 33), (64, 33), (128, 33)]
)
def test_conversations_differ(prompt: PromptText, tokens: int, least: int) -> None:
    assert len({tuple(prompt(conversation, 0, tokens)) for conversation in range(34)}) >= least


def test_a_turn_is_in_the_chat_format(prompt: PromptText, tokenizer: Tokenizer) -> None:
    first, next_ = prompt(0, 0, 30), prompt(0, 1, 30)
    frame, next_frame = tokenizer.turn([], first=True), tokenizer.turn([], first=False)
    assert first == tokenizer.turn(first[3 : 3 + 30 - len(frame)], first=True)
    assert next_ == tokenizer.turn(next_[5 : 5 + 30 - len(next_frame)], first=False)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_short_turn_is_words_alone(prompt: PromptText, tokenizer: Tokenizer, turn: int) -> None:
    for tokens in range(1, 11):
        assert not set(tokenizer.control) & set(prompt(0, turn, tokens))


def test_short_turns_are_whole_sentences(prompt: PromptText, tokenizer: Tokenizer) -> None:
    for turn in (0, 1):
        for tokens in (*range(2, 11), *range(13, 37)):
            text = tokenizer.decode(prompt(3, turn, tokens)).strip().removesuffix("\nassistant")
            assert text[-1] in ".?!", text


def test_a_long_turn_is_a_task_and_whole_words(prompt: PromptText, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(prompt(0, 0, 128))
    task, passage = text.removeprefix("user\n").split(":" if ":" in text else "?", 1)
    assert task
    assert passage.startswith(" ")
    assert len(passage.split()) > 60
