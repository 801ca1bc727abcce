"""The demo's workload: real conversation lengths, and who arrives when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from kvswitch import ConfigError
from kvswitch.scheduling import PriorityTrace

__all__ = ["Conversations", "PromptMaker", "Script", "Workload"]

PromptMaker = Callable[[int, int, int], list[int]]
"""(conversation, turn, tokens) -> token ids of a user's message of about so many tokens."""

_FEWEST = 16  # tokens of a user's message: the chat format takes ten of them
_EPOCHS = 4096  # length of a priority trace; it starts anew at its end


class ConversationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which conversations, and when they come."""

    count: int
    turns: int
    prompt_tokens: int
    output_tokens: int
    rate: float
    think_time: float


class PrioritySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How priorities change."""

    policy: Literal["random", "markov"]
    levels: int
    keep: float
    epoch: int
    quantum: int


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine has."""

    block_tokens: int
    memory_share: float
    slots: int
    prefill_tokens: int
    host_memory: str
    bandwidth: str


@dataclass(frozen=True)
class Script:
    """One conversation as it will go: when it starts, what is said, and the pauses between.

    Attributes
    ----------
    prompts : list of list of int
        Token ids of each turn's user message.
    outputs : list of int
        Tokens of each answer.
    pauses : list of float
        Seconds from an answer's end to the next turn; one fewer than turns.
    """

    arrival: float
    prompts: list[list[int]]
    outputs: list[int]
    pauses: list[float]

    @property
    def tokens(self) -> int:
        """Tokens of the whole conversation."""
        return sum(map(len, self.prompts)) + sum(self.outputs)


Conversations = list[Script]


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workload file, see workload.toml."""

    seed: int
    conversations: ConversationSettings
    priorities: PrioritySettings
    engine: EngineSettings

    @classmethod
    def load(cls, path: Path | None = None) -> Workload:
        """Read a workload file, or the default one.

        Raises
        ------
        ConfigError
            It cannot be read, or a setting is missing, unknown or of the wrong kind.
        """
        try:
            source = path or files("kvswitch_demo") / "workload.toml"
            return msgspec.toml.decode(source.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"cannot read workload {path}: {error}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"workload {path or 'workload.toml'}: {error}") from error

    def replace(self, section: str | None = None, **changes: Any) -> Workload:
        """A copy with other settings in a section (or at the top); None leaves one as it is."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if section is None:
            return msgspec.structs.replace(self, **changes)
        inner = msgspec.structs.replace(getattr(self, section), **changes)
        return msgspec.structs.replace(self, **{section: inner})

    def scripts(self, lengths: list[list[tuple[int, int]]], prompt: PromptMaker) -> Conversations:
        """Draw conversations and their times; the same ones for the same seed."""
        rng = np.random.default_rng(self.seed)
        wanted = self.conversations
        many = [turns for turns in lengths if len(turns) > 1]
        chosen = rng.choice(len(many), wanted.count, replace=len(many) < wanted.count)
        arrivals = np.cumsum(rng.exponential(1 / wanted.rate, wanted.count))
        result = []
        for index, (pick, arrival) in enumerate(zip(chosen, arrivals, strict=True)):
            turns = many[pick][: wanted.turns]
            result.append(
                Script(
                    arrival=float(arrival),
                    prompts=[
                        prompt(index, turn, max(_FEWEST, min(tokens, wanted.prompt_tokens)))
                        for turn, (tokens, _) in enumerate(turns)
                    ],
                    outputs=[max(2, min(tokens, wanted.output_tokens)) for _, tokens in turns],
                    pauses=rng.exponential(wanted.think_time, len(turns) - 1).tolist(),
                )
            )
        return result

    def trace(self) -> PriorityTrace:
        """The priorities that every mode shares."""
        p = self.priorities
        count = self.conversations.count
        if p.policy == "markov":
            return PriorityTrace.markov(self.seed, count, _EPOCHS, levels=p.levels, keep=p.keep)
        return PriorityTrace.random(self.seed, count, _EPOCHS, levels=p.levels)

    def device_blocks(self, scripts: Conversations) -> int:
        """Device blocks: a share of what all conversations come to, room for the longest at least.

        Every conversation is counted in whole blocks, as it is stored.
        """
        size = self.engine.block_tokens
        needs = [-(-script.tokens // size) for script in scripts]
        return max(int(self.engine.memory_share * sum(needs)), max(needs) + 1)
