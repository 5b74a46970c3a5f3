"""Who shares an epoch and is given up leaves its rest to the others: each sample once, whoever is lost, when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from paceline.data.loader import share
from paceline.data.part import Part
from paceline.data.trained import Trained
from paceline.protocol.deals import ALL, Deal, Dealt
from tests.unit.data.test_loader import Passes, numbers

ASSIGNMENTS = ["round_robin", "hash", "random", "block"]
SAMPLES = st.integers(0, 60)
Batches = list[list[int]]


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(self._samples))


def data(samples: int) -> TensorDataset:
    return TensorDataset(torch.arange(samples))


LOADERS: dict[str, Any] = {
    "in order": lambda n: DataLoader(data(n), batch_size=4),
    "shuffled": lambda n: DataLoader(data(n), batch_size=4, shuffle=True) if n else DataLoader(data(n), batch_size=4),
    "sampler": lambda n: DataLoader(data(n), batch_size=4, sampler=[*range(1, n, 2), *range(0, n, 2)]),
    "batch sampler": lambda n: DataLoader(
        data(n),
        batch_sampler=BatchSampler(RandomSampler(range(n), generator=torch.Generator().manual_seed(3)), 4, False)
        if n
        else [],
    ),
    "stream": lambda n: DataLoader(Stream(n), batch_size=4),
    "list": lambda n: [torch.arange(i, min(i + 4, n)) for i in range(0, n, 4)],
    "no length": lambda n: iter_again(n),
}


class iter_again:
    """An iterable without a length, which can be read more than once."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.arange(i, min(i + 4, self._samples)) for i in range(0, self._samples, 4))


class InDeal(Passes):
    """The passes of a worker that has this part."""

    def __init__(self, deal: Deal) -> None:
        super().__init__()
        self._deal = deal

    def deal(self, loader: int) -> Deal:  # type: ignore[override]
        return self._deal


def part_of(make: Any, samples: int, assign: str, deal: Deal, trained: tuple[Trained, ...] = ()) -> Batches:
    """The batches of a worker's part."""
    part = Part(0, 1, assign, 5, (trained,))
    loader = share(make(samples), 0, part, InDeal(deal), None)
    batches = [numbers(batch) for batch, _ in loader.batches(None)]
    with suppress(TypeError):  # a stream has no length
        assert loader.dealt() == len(batches)
    return batches


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("kind", LOADERS)
@given(SAMPLES, st.integers(1, 5), st.data())
def test_whoever_is_lost_each_sample_counts_once(
    kind: str, assign: str, samples: int, workers: int, draw: st.DataObject
) -> None:
    """In every deal some are lost, each after a few batches of its part; the last worker reads on to the end."""
    make, outs, counted = LOADERS[kind], dict[int, tuple[int, int]](), list[int]()
    sharers = tuple(draw.draw(st.permutations(range(9)))[:workers])
    sharers = tuple(sorted(sharers))
    for number in itertools.count():
        dealt = Dealt(0, number, sharers, outs)
        here = dealt.sharers_of(number)
        parts = {worker: part_of(make, samples, assign, dealt.part(worker, number)) for worker in here}
        lost = draw.draw(st.sets(st.sampled_from(here), max_size=len(here) - 1))
        done = {worker: draw.draw(st.integers(0, len(parts[worker]) + 1)) for worker in sorted(lost)}
        for worker in here:
            counted += itertools.chain(*parts[worker][: done.get(worker, ALL)])
        outs |= {worker: (number, done[worker]) for worker in lost}
        if not lost:
            break
    assert sorted(counted) == list(range(samples))


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("kind", LOADERS)
def test_the_rest_is_shared_by_all_who_are_left(kind: str, assign: str) -> None:
    """Also where workers share by the remainder of a number that told whose it was before."""
    dealt = Dealt(0, 1, (0, 1, 2, 3), {1: (0, 0), 3: (0, 0)})
    parts = [part_of(LOADERS[kind], 640, assign, dealt.part(worker, 1)) for worker in (0, 2)]
    sizes = [sum(map(len, batches)) for batches in parts]
    assert 200 < sum(sizes) < 440
    assert min(sizes) > 80


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_that_goes_on_within_a_second_deal_trains_on_what_was_left(kind: str, assign: str) -> None:
    """With two workers as then each goes on with its part; with three the rest is dealt to them."""
    outs = {1: (0, 2)}
    dealt = Dealt(0, 1, (0, 1, 2), outs)
    first = [part_of(LOADERS[kind], 60, assign, dealt.part(worker, 0)) for worker in (0, 2)]
    lost = part_of(LOADERS[kind], 60, assign, Deal(1, 3))[:2]
    second = [part_of(LOADERS[kind], 60, assign, dealt.part(worker, 1)) for worker in (0, 2)]
    counted = [*first, lost, [second[0][0]]]
    before = (Trained(0, 3, assign, 5, (ALL, 2, ALL)),)
    alike = [part_of(LOADERS[kind], 60, assign, Deal(rank, 2), before) for rank in (0, 1)]
    assert alike == second
    before += (Trained(0, 2, assign, 5, (1, 0), deal=1),)
    anew = [part_of(LOADERS[kind], 60, assign, Deal(rank, 3), before) for rank in (0, 1, 2)]
    samples = [number for batches in (*counted, *anew) for batch in batches for number in batch]
    assert sorted(samples) == list(range(60))
