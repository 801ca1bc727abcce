"""The demo's workload: files read strictly, the same conversations for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvswitch import ConfigError
from kvswitch.sim.workload import load_lengths
from kvswitch_demo.workload import Workload


def prompt(conversation: int, turn: int, tokens: int) -> list[int]:
    return [1000 * conversation + turn] * tokens


def test_default_workload_has_enough_turns_and_a_third_of_the_memory() -> None:
    workload = Workload.load()
    scripts = workload.scripts(load_lengths(), prompt)
    assert sum(len(script.prompts) for script in scripts) >= 100
    size = workload.engine.block_tokens
    whole = sum(-(-script.tokens // size) for script in scripts)
    assert workload.device_blocks(scripts) == int(workload.engine.memory_share * whole)


def test_same_seed_same_conversations() -> None:
    workload, lengths = Workload.load(), load_lengths()
    assert workload.scripts(lengths, prompt) == workload.scripts(lengths, prompt)
    assert workload.replace(seed=1).scripts(lengths, prompt) != workload.scripts(lengths, prompt)


def test_lengths_are_clipped_and_turns_come_after_each_other() -> None:
    workload = Workload.load()
    wanted = workload.conversations
    for script in workload.scripts(load_lengths(), prompt):
        assert 2 <= len(script.prompts) <= wanted.turns
        assert len(script.outputs) == len(script.prompts) == len(script.pauses) + 1
        assert all(16 <= len(tokens) <= wanted.prompt_tokens for tokens in script.prompts)
        assert all(2 <= tokens <= wanted.output_tokens for tokens in script.outputs)


def test_device_memory_always_holds_the_longest_conversation() -> None:
    workload = Workload.load().replace("engine", memory_share=0.001)
    scripts = workload.scripts(load_lengths(), prompt)
    longest = max(-(-script.tokens // workload.engine.block_tokens) for script in scripts)
    assert workload.device_blocks(scripts) == longest + 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed = 0\nsead = 1\n", "sead|required"),
        ("seed = 'zero'\n", "seed"),
        ("seed = \n", "workload"),
    ],
)
def test_workload_file_errors_name_the_field(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "workload.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Workload.load(file)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Workload.load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="nowhere"):
        load_lengths(tmp_path / "nowhere.csv")


def test_malformed_lengths_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("conversation,turn,prompt_tokens,output_tokens\n0,0,17,73\n0,1,many,3\n")
    with pytest.raises(ConfigError, match=r"lengths\.csv, line 3.*many"):
        load_lengths(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="prompt_tokens"):
        load_lengths(file)
