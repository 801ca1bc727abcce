"""Workloads: drawn the same everywhere, read strictly from the files that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch.sim.workload import (
    Lengths,
    Workload,
    load_azure,
    load_lengths,
    load_mooncake,
    load_sharegpt,
    load_trace,
    sample,
)

LENGTHS: Lengths = [[(10, 20), (5, 40)], [(100, 200)], [(7, 1), (3, 3), (0, 0)], [(900, 200)] * 9]


def drawn(**changes: object) -> Workload:
    settings: dict[str, object] = {"seed": 1, "count": 400, "rate": 2.0, "think": 3.0}
    return sample(LENGTHS, **{"context": 8192, **settings, **changes})  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same() -> None:
    assert drawn() == drawn()
    assert drawn() != drawn(seed=2)


def test_only_conversations_of_several_turns_unaltered() -> None:
    seen = {tuple(script.turns) for script in drawn(context=100_000).scripts}
    # A token at least, so that a turn has a beginning and an end.
    assert seen == {((10, 20), (5, 40)), ((7, 1), (3, 3), (1, 1)), ((900, 200),) * 9}


def test_what_exceeds_the_context_is_left_out_and_counted() -> None:
    everything, fitting = drawn(context=100_000), drawn(context=9_000)
    long = [script for script in everything.scripts if script.tokens > 9_000]
    assert fitting.excluded == len(long) > 0
    kept = [s for s in everything.scripts if s.tokens <= 9_000]
    assert [(s.turns, s.pauses) for s in fitting.scripts] == [(s.turns, s.pauses) for s in kept]
    with pytest.raises(ConfigError, match="every conversation exceeds the context of 3 tokens"):
        drawn(context=3)


@pytest.mark.parametrize("context", [100_000, 8_192])
def test_rates_count_conversations_or_turns_of_those_that_fit(context: int) -> None:
    conversations, turns = drawn(context=context), drawn(context=context, reading="turns")
    span = conversations.scripts[-1].arrival
    assert len(conversations.scripts) / span == pytest.approx(2.0, rel=0.15)
    assert turns.turns / turns.scripts[-1].arrival == pytest.approx(2.0, rel=0.15)
    assert conversations.offered() == conversations.output_tokens / span


def test_pauses_are_as_long_as_asked() -> None:
    pauses = [pause for script in drawn().scripts for pause in script.pauses]
    assert np.mean(pauses) == pytest.approx(3.0, rel=0.1)
    assert all(len(s.pauses) == len(s.turns) - 1 for s in drawn().scripts)
    assert not any(sum(script.pauses) for script in drawn(think=0.0).scripts)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"rate": 0.0}, {"think": -1.0}, {"context": 0}])
def test_numbers_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        drawn(**wrong)


def test_the_shipped_lengths_are_what_the_docs_say() -> None:
    turns = [len(conversation) for conversation in load_lengths()]
    assert len(turns) == 6000
    assert sum(turns) == 38_891
    assert np.mean(np.array(turns) > 1) == pytest.approx(0.69, abs=0.005)


# -- files ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_sharegpt_files_are_read_as_they_are(tmp_path: Path) -> None:
    def said(who: str, words: int) -> dict[str, str]:
        return {"from": who, "value": "word " * words}

    entries = [
        {"id": "a", "conversations": [said("human", 10), said("gpt", 100), said("human", 20)]},
        {"id": "b", "conversations": [said("gpt", 10), said("human", 10), said("human", 10),
                                      said("gpt", 10)]},
        {"id": "c", "conversations": []},
    ]  # fmt: skip
    path = write(tmp_path / "share.json", json.dumps(entries))
    assert load_sharegpt(path) == [[(13, 130)], [(26, 13)]]


MOONCAKE = """\
{"timestamp": 0, "input_length": 1300, "output_length": 100, "hash_ids": [0, 1, 2]}
{"timestamp": 500, "input_length": 600, "output_length": 10, "hash_ids": [0, 9]}
{"timestamp": 9000, "input_length": 1500, "output_length": 50, "hash_ids": [0, 1, 3]}
{"timestamp": 9500, "input_length": 2100, "output_length": 50, "hash_ids": [0, 1, 3, 4, 5]}
"""


def test_mooncake_requests_that_extend_one_are_its_turns(tmp_path: Path) -> None:
    workload = load_mooncake(write(tmp_path / "trace.jsonl", MOONCAKE), 100_000)
    chat, other = workload.scripts
    # 1,300 tokens and 100 generated ones are there already when 1,500 come.
    assert chat.turns == [(1300, 100), (100, 50), (550, 50)]
    assert (chat.arrival, chat.due) == (0.0, [0.0, 9.0, 9.5])
    assert chat.next_turn(1, ended=4.0) == 9.0
    assert chat.next_turn(1, ended=12.0) == 12.0
    assert other.turns == [(600, 10)]


def test_azure_requests_are_conversations_of_one_turn(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = load_azure(write(tmp_path / "azure.csv", text), 8192).scripts
    assert (first.arrival, first.turns) == (0.0, [(374, 44)])
    assert second.arrival == pytest.approx(4.314579)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_times_may_have_a_zone_and_any_number_of_digits(tmp_path: Path) -> None:
    text = f"{AZURE}2024-05-10 00:00:00+00:00,1,2\n2024-05-10 00:00:00.009930+00:00,3,4\n"
    first, second = load_azure(write(tmp_path / "azure.csv", text), 8192).scripts
    assert second.arrival - first.arrival == pytest.approx(0.00993)


def test_mooncake_times_count_from_the_first(tmp_path: Path) -> None:
    """A part of a trace is served as if it were all."""
    later = "\n".join(MOONCAKE.splitlines()[1:])
    scripts = load_mooncake(write(tmp_path / "trace.jsonl", later), 100_000).scripts
    assert min(script.arrival for script in scripts) == 0.0
    assert max(script.due[-1] for script in scripts if script.due) == 9.0


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.jsonl", MOONCAKE.replace("9500", "8000"), "line 4: timestamp lies before"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,1,x\n", "line 2: GeneratedTokens must be a count"),
        ("a.csv", AZURE + '"' + "x" * 200_000, "line 1: field larger"),
        ("a.csv", "TIMESTAMP," + "x" * 200_000, "cannot read .*: field larger"),
        ("a.jsonl", MOONCAKE + "{", r"a\.jsonl, line 5"),
        ("a.jsonl", MOONCAKE.replace("600", '"x"'), r"line 2.*input_length"),
        ("a.jsonl", MOONCAKE.replace("600", "-6"), r"line 2: input_length must not be negative"),
        ("a.jsonl", "", "no request"),
        ("a.csv", "TIMESTAMP,ContextTokens\n", r"line 1: there is no column GeneratedTokens"),
        ("a.csv", AZURE + "soon,1,2\n", r"line 2: TIMESTAMP: .*soon"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,1\n", "line 2"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,1,-2\n", "line 2"),
        ("a.csv", "conversation,turn,prompt_tokens,output_tokens\n0,0,17,x\n", r"line 2.*'x'"),
        (
            "a.csv",
            "conversation,turn,prompt_tokens,output_tokens\n0,0,17,-1\n",
            r"line 2.*output_tokens must be a count",
        ),
        ("a.csv", "conversation,turn,prompt_tokens,output_tokens\n", "no conversation"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[", "cannot read"),
        ("a.json", '[{"id": 1}]', "entry 0: 'conversations'"),
        ("a.json", '[{"conversations": [{"from": "human"}]}]', "entry 0, message 0: 'value'"),
        ("a.xml", "<a/>", "what is it"),
    ],
)
def test_malformed_files_name_line_and_field(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=complaint):
        load_trace(path, context=8192, seed=0, count=3, rate=1.0, think=1.0)


def test_lengths_may_be_gzipped(tmp_path: Path) -> None:
    text = "conversation,turn,prompt_tokens,output_tokens\n0,0,17,73\n0,1,4,3\n"
    path = tmp_path / "lengths.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert load_lengths(path) == [[(17, 73), (4, 3)]]
    workload = load_trace(path, context=8192, seed=0, count=3, rate=1.0, think=1.0)
    assert len(workload.scripts) == 3
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\xff\xff\xff\xff" + whole[24:])
    with pytest.raises(ConfigError, match="cannot read"):
        load_lengths(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match="cannot read"):
        load_lengths(path)
