"""Batches as bytes: what comes back is what was sent, and bytes from elsewhere are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.params.table import DTYPES
from paceline.transport.batches import decode, encode

TENSORS = st.builds(
    lambda dtype, shape: (torch.arange(int(np.prod(shape)), dtype=torch.int64) % 2).to(dtype).view(shape),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
LEAVES = TENSORS | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary() | st.none()
BATCHES = st.recursive(
    LEAVES | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@given(BATCHES)
def test_what_comes_back_is_what_was_sent(batch: Any) -> None:
    assert same(decode(bytearray(encode(batch))), batch)


def test_arrays_come_back_as_arrays() -> None:
    sent = {"x": np.arange(6.0).reshape(2, 3), "n": np.float32(2.5)}
    back = decode(bytearray(encode(sent)))
    assert isinstance(back["x"], np.ndarray)
    assert np.array_equal(back["x"], sent["x"])
    assert back["n"] == np.float32(2.5)


def test_a_transposed_tensor_is_sent_by_value() -> None:
    batch = torch.arange(6).view(2, 3).t()
    assert torch.equal(decode(bytearray(encode(batch))), batch)


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(ConfigError, match="holds set, which cannot be sent"):
        encode([torch.zeros(1), {1, 2}])


@given(BATCHES, st.data())
def test_damaged_bytes_are_refused_or_are_a_batch(batch: Any, data: st.DataObject) -> None:
    encoded = bytearray(encode(batch))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.integers(0, len(encoded)))
    try:
        decode(encoded[:kept])
    except ValueError:
        return


@pytest.mark.parametrize(
    "structure", [{"a": 1}, ["d", [{"a": 1}, 2]], ["d", [["l", 1], 2]], ["d", [["a", ["T", 0]], 2]]]
)
def test_what_no_batch_is_made_of_is_refused(structure: Any) -> None:
    head = msgspec.msgpack.encode((structure, [("uint8", (1,))]))
    with pytest.raises(ValueError, match="a structure that is none of ours"):
        decode(bytearray(len(head).to_bytes(4, "little") + head + b"\x01"))
