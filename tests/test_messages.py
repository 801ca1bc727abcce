"""What passes between the two halves arrives as it was sent, or not at all."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kvswitch.errors import TransferError
from kvswitch.messages import (
    Direction,
    Measurement,
    Observations,
    SwapOrders,
    Transfer,
    decode_observations,
    decode_orders,
    encode,
)

ids = st.integers(0, 2**40)
id_tuples = st.lists(ids, max_size=4).map(tuple)
runs = st.integers(0, 5).flatmap(
    lambda n: npst.arrays(np.int32, (n, 3), elements=st.integers(0, 2**31 - 1))
)
transfers = st.builds(
    Transfer, id=ids, direction=st.sampled_from(Direction), runs=runs, after=id_tuples
)
orders = st.builds(
    SwapOrders,
    step=ids,
    transfers=st.lists(transfers, max_size=3).map(tuple),
    cancel=id_tuples,
    wait=id_tuples,
)
seconds = st.floats(0, 1e6)
observations = st.builds(
    Observations,
    completed=id_tuples,
    failed=id_tuples,
    measurements=st.lists(
        st.builds(Measurement, direction=st.sampled_from(Direction), nbytes=ids, seconds=seconds),
        max_size=3,
    ).map(tuple),
    step_seconds=st.none() | seconds,
)


@settings(deadline=None)
@given(orders)
def test_orders_arrive_as_they_were_sent(sent: SwapOrders) -> None:
    arrived = decode_orders(encode(sent))
    assert (arrived.step, arrived.cancel, arrived.wait) == (sent.step, sent.cancel, sent.wait)
    assert len(arrived.transfers) == len(sent.transfers)
    for there, here in zip(arrived.transfers, sent.transfers, strict=True):
        assert (there.id, there.direction, there.after) == (here.id, here.direction, here.after)
        assert isinstance(there.direction, Direction)
        assert there.runs.dtype == np.int32
        assert there.runs.shape == here.runs.shape
        assert (there.runs == here.runs).all()
        assert there.num_blocks == here.num_blocks


@settings(deadline=None)
@given(observations)
def test_observations_arrive_as_they_were_sent(sent: Observations) -> None:
    assert decode_observations(encode(sent)) == sent


def test_runs_need_not_be_contiguous_in_memory() -> None:
    every_other = np.arange(24, dtype=np.int32).reshape(8, 3)[::2]
    turned = np.arange(12, dtype=np.int32).reshape(3, 4).T
    for runs in (every_other, turned):
        sent = SwapOrders(1, (Transfer(0, Direction.OUT, runs),))
        assert decode_orders(encode(sent)).transfers[0].runs.tolist() == runs.tolist()


@pytest.mark.parametrize("kind", [np.int64, np.uint32, np.float32])
def test_runs_that_could_lose_digits_are_not_sent(kind: type) -> None:
    wide: Any = np.full((1, 3), 5, kind)
    with pytest.raises(TypeError, match="Cannot cast"):
        encode(SwapOrders(1, (Transfer(0, Direction.OUT, wide),)))


def test_only_arrays_are_sent_beside_what_msgspec_knows() -> None:
    with pytest.raises(NotImplementedError, match="cannot serialise object"):
        encode(SwapOrders(1, cancel=(object(),)))  # type: ignore[arg-type]


def test_number_of_blocks() -> None:
    runs = np.array([[0, 10, 4], [8, 2, 1]], np.int32)
    assert Transfer(1, Direction.IN, runs).num_blocks == 5
    assert Transfer(1, Direction.IN, np.empty((0, 3), np.int32)).num_blocks == 0


def wire(**transfer: Any) -> bytes:
    whole = {"id": 1, "direction": 0, "runs": bytes(12), **transfer}
    return msgspec.msgpack.encode({"step": 1, "transfers": [whole]})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        wire()[:-1],
        wire() + b"\x00",
        wire(runs=bytes(11)),
        wire(runs="x" * 12),
        wire(runs=None),
        wire(runs=[0] * 12),
        wire(direction=2),
        wire(id="one"),
        wire(afterwards=[]),
        msgspec.msgpack.encode({"transfers": []}),
        encode(Observations()),
    ],
)
def test_what_is_no_orders_message_is_refused(data: bytes) -> None:
    assert decode_orders(wire()).transfers[0].num_blocks == 0, "else this shows nothing"
    with pytest.raises(TransferError, match="not a SwapOrders message"):
        decode_orders(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode(Observations(completed=(1,)))[:-1],
        encode(SwapOrders(1)),
        msgspec.msgpack.encode({"completed": 1}),
        msgspec.msgpack.encode({"measurements": [{"direction": 0}]}),
    ],
)
def test_what_is_no_observations_message_is_refused(data: bytes) -> None:
    with pytest.raises(TransferError, match="not an Observations message"):
        decode_observations(data)


@settings(deadline=None)
@given(orders, st.data())
def test_damaged_messages_never_end_in_another_error(sent: SwapOrders, data: st.DataObject) -> None:
    damaged = bytearray(encode(sent))
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_orders, decode_observations):
        with suppress(TransferError):
            decode(bytes(damaged))
