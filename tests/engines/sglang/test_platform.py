"""What the tests' CPU platform computes in SGLang's place, compared with the textbook."""

from __future__ import annotations

import math

import pytest
import torch
from sglang_plain_cpu.attention import _attend, _attend_last
from sglang_plain_cpu.linear import _product

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def textbook(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the last rows, one row and head after the other."""
    found = torch.empty_like(query)
    for row in range(len(query)):
        seen = slots[: len(slots) - len(query) + row + 1]
        for head in range(HEADS):
            of = head // (HEADS // KEY_HEADS)
            weights = (keys[seen, of] @ query[row, head] / math.sqrt(SIZE)).softmax(0)
            found[row, head] = weights @ values[seen, of]
    return found


@pytest.fixture
def caches() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values; what nobody has is NaN."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 40, KEY_HEADS, SIZE)
    keys[30:], values[30:] = math.nan, math.nan
    return keys, values


def test_last_tokens_of_requests_of_different_lengths(
    caches: tuple[torch.Tensor, torch.Tensor],
) -> None:
    query = torch.randn(2, HEADS, SIZE)
    slots = torch.tensor([[3, 1, 4, 31, 32], [20, 21, 7, 9, 2]])
    found = torch.empty_like(query)
    _attend_last(query, found, *caches, slots, torch.tensor([3, 5]), SIZE**-0.5)
    for i, length in enumerate((3, 5)):
        expected = textbook(query[i : i + 1], *caches, slots[i, :length])
        torch.testing.assert_close(found[i : i + 1], expected)


@pytest.mark.parametrize("count", [2, 5])
def test_several_tokens_of_a_request_with_and_without_a_prefix(
    caches: tuple[torch.Tensor, torch.Tensor], count: int
) -> None:
    query = torch.randn(count, HEADS, SIZE)
    slots = torch.tensor([[20, 21, 7, 9, 2]])
    found = torch.empty_like(query)
    _attend(query, found, *caches, slots, SIZE**-0.5)
    torch.testing.assert_close(found, textbook(query, *caches, slots[0]))


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_arranged_weights_give_the_same_product(rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 32, dtype=torch.bfloat16), requires_grad=False)
    for _ in range(2):
        x = torch.randn(rows, 32, dtype=torch.bfloat16)
        torch.testing.assert_close(_product(x, weight, None), x @ weight.T)
