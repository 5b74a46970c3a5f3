"""How many samples are in a batch, whatever it is made of."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from paceline.data.count import count_samples
from paceline.errors import ConfigError

Pair = namedtuple("Pair", "x y")


@dataclass
class Batch:
    name: str
    x: Any


class Slotted:
    __slots__ = ("x",)


FIVE = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        pytest.param(FIVE, 5, id="a tensor"),
        pytest.param((FIVE, torch.zeros(5)), 5, id="a pair"),
        pytest.param([FIVE, torch.zeros(7)], 5, id="the first counts"),
        pytest.param({"x": FIVE}, 5, id="a mapping"),
        pytest.param({"id": ["a", "b"], "n": 3, "x": {"tokens": FIVE}}, 5, id="texts and numbers are passed over"),
        pytest.param(Pair(x=FIVE, y=None), 5, id="a named tuple"),
        pytest.param(Batch("train", FIVE), 5, id="a dataclass"),
        pytest.param(SimpleNamespace(meta=SimpleNamespace(x=FIVE)), 5, id="objects in objects"),
        pytest.param([[[[FIVE]]]], 5, id="four levels down"),
        pytest.param((torch.tensor(3.0), FIVE), 5, id="a scalar has no samples"),
        pytest.param((np.float32(3.0), np.zeros((4, 2))), 4, id="arrays"),
        pytest.param(torch.zeros(0, 3), 0, id="an empty batch has none"),
        pytest.param(FIVE.to_sparse(), 5, id="a sparse tensor"),
        pytest.param([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], 3, id="a list of images counts its first"),
    ],
)
def test_the_first_dimension_found_counts(batch: Any, samples: int) -> None:
    found = count_samples(batch)
    assert found == samples
    assert type(found) is int


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (["a", "b"], "list"),
        ("text", "str"),
        (b"data", "bytes"),
        (7, "int"),
        (None, "NoneType"),
        (torch.tensor(1.0), "Tensor"),
        ({}, "dict"),
        ([[[[[FIVE]]]]], "list"),
        (Slotted(), "Slotted"),
        (iter([FIVE]), "list_iterator"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_what_to_do(batch: Any, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_samples(batch)
    assert caught.value.what.startswith(f"cannot count the samples in a batch of type {kind}: ")
    assert "count=function" in caught.value.fix


def test_a_batch_that_contains_itself_is_refused_not_searched_for_ever() -> None:
    batch: list[Any] = []
    batch.append(batch)
    with pytest.raises(ConfigError):
        count_samples(batch)


def test_counting_looks_and_does_not_draw() -> None:
    drawn = iter([FIVE])
    with pytest.raises(ConfigError):
        count_samples((drawn,))
    assert next(drawn) is FIVE
