"""Claims about telling whether two workers read the same data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from paceline.data.fingerprint import fingerprint


def drawn(seed: int, *, size: tuple[int, ...] = (1000, 3), dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, generator=generator).mul(100).to(dtype), torch.arange(size[0]))


def split(seed: int) -> Any:
    return random_split(drawn(0), [900, 100], torch.Generator().manual_seed(seed))[0]


class Numbered(Dataset[int]):
    def __init__(self, length: int) -> None:
        self._length = length

    def __getitem__(self, number: int) -> int:
        raise AssertionError("no sample is to be read for it")

    def __len__(self) -> int:
        return self._length


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        raise AssertionError("no sample is to be read for it")

    def __len__(self) -> int:
        raise OSError("not known")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (drawn(0), drawn(1)),
        (drawn(0, size=(7,)), drawn(1, size=(7,))),
        (drawn(0, dtype=torch.int64), drawn(0)),
        (drawn(0), drawn(0, size=(1001, 3))),
        (split(0), split(1)),
        (Subset(drawn(0), range(9)), Subset(drawn(1), range(9))),
        (ConcatDataset([drawn(0), drawn(1)]), ConcatDataset([drawn(0), drawn(2)])),
        (Numbered(5), Numbered(6)),
    ],
)
def test_other_data_have_another(one: Any, other: Any) -> None:
    assert fingerprint(DataLoader(one, batch_size=4)) != fingerprint(DataLoader(other, batch_size=4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: drawn(3),
        lambda: drawn(3, dtype=torch.complex64),
        lambda: drawn(3, dtype=torch.bool),
        lambda: drawn(3, size=(0, 4)),
        lambda: TensorDataset(torch.eye(5).to_sparse()),
        lambda: split(3),
        lambda: Numbered(1 << 40),
        Stream,
    ],
)
def test_the_same_data_have_the_same(make: Any) -> None:
    assert fingerprint(DataLoader(make(), batch_size=4)) == fingerprint(DataLoader(make(), batch_size=4))
    assert fingerprint([make()]) == fingerprint([make()])
