"""What scripts keep comes back as it was, through plain JSON and tensors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.params.packing import Tensors, pack, unpack

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
values = st.recursive(
    plain, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner), max_leaves=12
)


def through(value: Any) -> Any:
    tensors: Tensors = {}
    return unpack(json.loads(json.dumps(pack(value, tensors, "x"))), tensors)


@given(values)
def test_what_is_packed_comes_back(value: Any) -> None:
    found = through(value)
    assert found == value
    assert type(found) is type(value)


def test_numbers_that_json_has_not() -> None:
    infinite, nothing = through([math.inf, math.nan])
    assert infinite == math.inf
    assert math.isnan(nothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_as_copies(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    found = through({"a": [tensor]})["a"][0]
    assert found.dtype is dtype
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", ["float64", "uint32", "int8", "bool", "uint64"])
def test_arrays_come_back(dtype: str) -> None:
    array = np.array([0, 1, 1]).astype(dtype)
    found = through(array)
    assert found.dtype == array.dtype
    assert (found == array).all()


def test_the_state_of_an_optimizer_and_a_scheduler() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    state = through(optimizer.state_dict())
    other = torch.optim.Adam([weight])
    other.load_state_dict(state)
    assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    assert through(scheduler.state_dict()) == scheduler.state_dict()


def test_what_would_have_to_run_code_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.a\.1 is a builtins\.object, which cannot be kept"):
        pack({"a": [1, object()]}, {}, "model")
