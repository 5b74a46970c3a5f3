"""The parts of workers together are the epoch: every sample once, in one order that all agree on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from paceline.config import ASSIGNMENTS
from paceline.data.count import count_samples
from paceline.data.loader import share
from paceline.data.part import Part
from paceline.errors import ConfigError

Batches = list[list[int]]


class Passes:
    """Takes down what a pass tells, and says whether training is over."""

    def __init__(self, *, training: bool = True, over_after: int | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._training, self._over_after = training, over_after

    def begin(self, loader: int, length: int | None) -> bool:
        self.told.append(("begin", loader, length))
        return self._training

    def epoch(self, loader: int) -> int:
        return sum(one[0] in ("end", "leave") and one[1] == loader for one in self.told)

    def drawn(self, loader: int, samples: int) -> None:
        self.told.append(("drawn", samples))

    @property
    def over(self) -> bool:
        return self._over_after is not None and len(self.samples) >= self._over_after

    def skip(self, loader: int) -> int:
        return 0

    def deal(self, loader: int) -> None: ...

    def fetching(self) -> None: ...

    def border(self) -> None: ...

    def fetched(self, loader: int) -> None: ...

    def needs_ghost(self, loader: int) -> bool:
        return False

    def leases(self, loader: int) -> None:
        return None

    def more(self, loader: int) -> bool:
        return False

    def verdict(self, loader: int) -> bool | None:
        return None

    def pending(self, loader: int) -> None: ...

    def end(self, loader: int) -> None:
        self.told.append(("end", loader))

    def leave(self, loader: int) -> None:
        self.told.append(("leave", loader))

    @property
    def samples(self) -> list[int]:
        return [entry[1] for entry in self.told if entry[0] == "drawn"]


def wrap(source: Any, rank: int = 0, workers: int = 1, *, passes: Passes | None = None, **options: Any) -> Any:
    part = Part(rank, workers, options.pop("assign", "round_robin"), options.pop("seed", 0))
    return share(source, options.pop("index", 0), part, passes or Passes(), options.pop("count", None))


def numbers(batch: Any) -> list[int]:
    return [int(number) for number in (batch if isinstance(batch, torch.Tensor) else batch[0])]


def one_pass(loader: Iterable[Any]) -> Batches:
    return [numbers(batch) for batch in loader]


def dealt(make: Callable[[], Any], workers: int, epochs: int = 1, **options: Any) -> list[list[Batches]]:
    """``[epoch][rank]`` -> that worker's batches. Every worker has random numbers of its own behind it."""
    loaders = []
    for rank in range(workers):
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        loaders.append(wrap(make(), rank, workers, **options))
    return [[one_pass(loader) for loader in loaders] for _ in range(epochs)]


def flat(batches: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(batches))


def samples_of(by_rank: list[Batches]) -> list[int]:
    return flat(flat(by_rank))


def in_turn(by_rank: list[Batches]) -> Batches:
    """The batches in the order they are dealt: the first of each worker, then the second ..."""
    return [batch for round_ in itertools.zip_longest(*by_rank) for batch in round_ if batch is not None]


# --- what a plain loader's epoch is made of ---

SIZES = st.integers(0, 60)
BATCH = st.integers(1, 8)
WORKERS = st.integers(1, 5)
SEEDS = st.integers(0, 2**63 - 1)


@settings(max_examples=200)
@given(SIZES, BATCH, WORKERS, st.booleans(), SEEDS)
def test_round_robin_deals_the_very_batches_one_worker_would_see_in_order(
    size: int, batch: int, workers: int, drop_last: bool, seed: int
) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(size), batch_size=batch, shuffle=size > 0, drop_last=drop_last)

    alone = dealt(make, 1, epochs=2, seed=seed)
    together = dealt(make, workers, epochs=2, seed=seed)
    for one, by_rank in zip(alone, together, strict=True):
        assert in_turn(by_rank) == one[0]


@settings(max_examples=300)
@given(st.sampled_from(ASSIGNMENTS), SIZES, BATCH, WORKERS, st.booleans(), st.booleans(), SEEDS)
def test_an_epoch_is_every_sample_once(
    assign: str, size: int, batch: int, workers: int, shuffle: bool, drop_last: bool, seed: int
) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(size), batch_size=batch, shuffle=shuffle and size > 0, drop_last=drop_last)

    for by_rank in dealt(make, workers, epochs=2, assign=assign, seed=seed):
        found = samples_of(by_rank)
        assert len(set(found)) == len(found)
        sizes = [[len(one) for one in batches] for batches in by_rank]
        assert all(length == batch for batches in sizes for length in batches[:-1])
        if not drop_last:
            assert sorted(found) == list(range(size))
        elif assign == "round_robin":
            assert len(found) == size // batch * batch
        else:  # each worker drops what does not fill a batch of its own
            assert all(length == batch for batches in sizes for length in batches)
            assert size - len(found) <= workers * (batch - 1)


@settings(max_examples=100)
@given(st.sampled_from(["hash", "block"]), SIZES, BATCH, WORKERS, st.booleans())
def test_hash_and_block_keep_the_owners_of_samples_over_epochs(
    assign: str, size: int, batch: int, workers: int, shuffle: bool
) -> None:
    epochs = dealt(
        lambda: DataLoader(range(size), batch_size=batch, shuffle=shuffle and size > 0),
        workers,
        epochs=3,
        assign=assign,
    )
    held = [[sorted(flat(batches)) for batches in by_rank] for by_rank in epochs]
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_the_seed_decides_the_order_and_every_epoch_has_its_own(assign: str) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(range(200), batch_size=8, shuffle=True)

    first, again, other = (dealt(make, 3, epochs=3, assign=assign, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    orders = [samples_of(by_rank) for by_rank in first]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_without_shuffle_every_worker_goes_through_its_part_in_order(assign: str) -> None:
    for by_rank in dealt(lambda: DataLoader(range(50), batch_size=4), 3, epochs=2, assign=assign):
        for batches in by_rank:
            assert flat(batches) == sorted(flat(batches))


# --- len ---


@settings(max_examples=200)
@given(SIZES, BATCH, WORKERS, st.booleans())
def test_len_is_the_same_on_all_workers_where_batches_are_dealt_in_turn(
    size: int, batch: int, workers: int, drop_last: bool
) -> None:
    source = DataLoader(range(size), batch_size=batch, drop_last=drop_last)
    loaders = [wrap(source, rank, workers) for rank in range(workers)]
    lengths = [len(one_pass(loader)) for loader in loaders]
    assert {len(loader) for loader in loaders} == {-(-len(source) // workers)} == {max(lengths)}


@settings(max_examples=200)
@given(st.sampled_from(["hash", "random", "block"]), SIZES, BATCH, WORKERS, st.booleans(), st.booleans())
def test_len_is_exact_where_samples_have_owners(
    assign: str, size: int, batch: int, workers: int, shuffle: bool, drop_last: bool
) -> None:
    source = DataLoader(range(size), batch_size=batch, shuffle=shuffle and size > 0, drop_last=drop_last)
    for rank in range(workers):
        loader = wrap(source, rank, workers, assign=assign)
        for _ in range(2):
            assert len(loader) == len(one_pass(loader))


@settings(max_examples=100)
@given(st.sampled_from(ASSIGNMENTS), SIZES, BATCH, WORKERS, st.booleans())
def test_within_a_pass_len_is_how_many_batches_it_gives(
    assign: str, size: int, batch: int, workers: int, drop_last: bool
) -> None:
    source = DataLoader(range(size), batch_size=batch, drop_last=drop_last)
    for rank in range(workers):
        loader = wrap(source, rank, workers, assign=assign)
        between = len(loader)
        lengths = [len(loader) for _ in loader]
        assert lengths == [len(lengths)] * len(lengths)
        assert len(loader) == between or assign != "round_robin"  # the next pass may be dealt otherwise


def test_after_a_pass_that_was_left_early_len_is_the_usual() -> None:
    loader = wrap(DataLoader(range(10), batch_size=2), 1, 2)
    for _ in loader:
        assert len(loader) == 2
        break
    assert len(loader) == 3


# --- samplers, batch samplers and streams ---


class Everything(Sampler[int]):
    """All numbers, in an order drawn from any of the three global random sources."""

    def __init__(self, size: int, kind: str) -> None:
        self._size, self._kind = size, kind

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._size))
        if self._kind == "python":
            random.shuffle(order)
        elif self._kind == "numpy":
            order = np.random.permutation(self._size).tolist()
        elif self._kind == "numpy integers":
            return iter(np.random.permutation(self._size))
        else:
            order = torch.randperm(self._size).tolist()
        return iter(order)


class InPairs(Sampler[list[int]]):
    """A batch sampler of the user's own: neighbours together, the pairs in a drawn order."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return -(-self._size // 2)

    def __iter__(self) -> Iterator[list[int]]:
        starts = list(range(0, self._size, 2))
        random.shuffle(starts)
        return (list(range(start, min(start + 2, self._size))) for start in starts)


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self._size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self._size


class Chunks(Dataset[torch.Tensor]):
    """Its items are batches already."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return -(-self._size // 4)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(index * 4, min(index * 4 + 4, self._size))


class Bag:
    """Iterable anew each time, with attributes of its own; not a DataLoader."""

    def __init__(self, size: int) -> None:
        self.classes = 10
        self._batches = [torch.arange(start, min(start + 4, size)) for start in range(0, size, 4)]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)


# Sources of batches over ``size`` samples, each of which every epoch has once.
SOURCES: dict[str, Callable[[int], Any]] = {
    "python's random": lambda size: DataLoader(range(size), batch_size=3, sampler=Everything(size, "python")),
    "numpy's random": lambda size: DataLoader(range(size), batch_size=3, sampler=Everything(size, "numpy")),
    "numpy's integers": lambda size: DataLoader(range(size), batch_size=3, sampler=Everything(size, "numpy integers")),
    "torch's random": lambda size: DataLoader(range(size), batch_size=3, sampler=Everything(size, "torch")),
    "a subset of all": lambda size: DataLoader(range(size), batch_size=3, sampler=SubsetRandomSampler(range(size))),
    "a list of numbers": lambda size: DataLoader(range(size), batch_size=3, sampler=list(range(size))),
    "a generator of the user's": lambda size: DataLoader(
        range(size), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "a batch sampler": lambda size: DataLoader(range(size), batch_sampler=InPairs(size)),
    "a list of lists of numbers": lambda size: DataLoader(range(size), batch_sampler=[[n] for n in range(size)]),
    "batches as items": lambda size: DataLoader(Chunks(size), batch_size=None),
    "batches as items, shuffled": lambda size: DataLoader(Chunks(size), batch_size=None, shuffle=True),
    "a stream": lambda size: DataLoader(Stream(size), batch_size=3),
    "a stream with a length": lambda size: DataLoader(SizedStream(size), batch_size=3),
    "a list of batches": lambda size: list(Bag(size)),
    "any iterable": Bag,
}


@pytest.mark.parametrize("size", [1, 7, 24])
@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("name", SOURCES)
def test_an_epoch_of_any_source_is_every_sample_once(name: str, assign: str, size: int) -> None:
    for workers in (1, 2, 3):
        for by_rank in dealt(lambda: SOURCES[name](size), workers, epochs=2, assign=assign):
            assert sorted(samples_of(by_rank)) == list(range(size))


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_is_dealt_in_turn_as_one_worker_would_see_it(name: str) -> None:
    alone = dealt(lambda: SOURCES[name](26), 1, epochs=2)
    together = dealt(lambda: SOURCES[name](26), 3, epochs=2)
    assert [in_turn(by_rank) for by_rank in together] == [by_rank[0] for by_rank in alone]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("name", SOURCES)
def test_no_worker_gets_more_batches_than_len_says(name: str, assign: str) -> None:
    """Scripts size schedules by it (OneCycleLR raises at the first step past its total)."""
    for workers, rank, size in itertools.product((1, 2, 3), range(3), (1, 10, 40)):
        if rank >= workers:
            continue
        loader = wrap(SOURCES[name](size), rank, workers, assign=assign)
        for _ in range(2):
            try:
                length = len(loader)
            except TypeError:
                assert name in ("a stream", "any iterable")
                continue
            assert len(one_pass(loader)) <= length


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("name", SOURCES)
def test_within_a_pass_len_is_exact_of_any_source_that_knows_its_own(name: str, assign: str) -> None:
    if name in ("a stream", "any iterable"):
        return
    for rank in range(3):
        loader = wrap(SOURCES[name](26), rank, 3, assign=assign)
        for _ in range(2):
            lengths = [len(loader) for _ in loader]
            assert lengths == [len(lengths)] * len(lengths)


@pytest.mark.parametrize("assign", ["hash", "block"])
@pytest.mark.parametrize("name", list(SOURCES)[: list(SOURCES).index("a batch sampler")])
def test_samples_drawn_by_any_sampler_keep_their_owners(name: str, assign: str) -> None:
    epochs = dealt(lambda: SOURCES[name](40), 3, epochs=3, assign=assign)
    held = [[sorted(flat(batches)) for batches in by_rank] for by_rank in epochs]
    assert held[0] == held[1] == held[2]
    expected = dealt(lambda: DataLoader(range(40), batch_size=3), 3, assign=assign)
    assert held[0] == [sorted(flat(batches)) for batches in expected[0]]


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize(
    "sampler",
    [
        lambda: RandomSampler(range(20), replacement=True, num_samples=50),
        lambda: WeightedRandomSampler([1.0] * 19 + [30.0], 50),
        lambda: SubsetRandomSampler([1, 3, 5, 7, 9, 11]),
    ],
    ids=["with replacement", "weighted", "a part of the data"],
)
def test_draws_that_are_no_permutation_are_divided_as_they_are(sampler: Callable[[], Any], assign: str) -> None:
    """What one worker would draw in the epoch is what all draw together, repetitions included."""
    alone = dealt(lambda: DataLoader(range(20), batch_size=4, sampler=sampler()), 1, epochs=2, assign=assign)
    together = dealt(lambda: DataLoader(range(20), batch_size=4, sampler=sampler()), 3, epochs=2, assign=assign)
    for one, by_rank in zip(alone, together, strict=True):
        assert Counter(samples_of(by_rank)) == Counter(samples_of(one))


def test_a_sampler_leaves_the_scripts_random_numbers_alone() -> None:
    loader = wrap(DataLoader(range(20), batch_size=4, sampler=Everything(20, "python")))
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    iterator = iter(loader)
    next(iterator)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    torch.manual_seed(1)
    one_pass(wrap(DataLoader(range(20), batch_size=4, sampler=Everything(20, "torch"))))
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    one_pass(DataLoader(range(20), batch_size=4))  # a plain loader draws a seed for its own processes
    assert torch.equal(torch.random.get_rng_state(), after)


# --- the loader that comes back ---


@pytest.mark.parametrize("assign", ["round_robin", "hash"])
@pytest.mark.parametrize("persistent", [False, True])
def test_processes_of_the_loaders_own_change_nothing(assign: str, persistent: bool) -> None:
    def make(processes: int) -> DataLoader[Any]:
        options: dict[str, Any] = {"persistent_workers": persistent, "prefetch_factor": 4} if processes else {}
        return DataLoader(range(41), batch_size=4, shuffle=True, num_workers=processes, **options)

    assert dealt(lambda: make(2), 2, epochs=2, assign=assign) == dealt(lambda: make(0), 2, epochs=2, assign=assign)


def test_samples_are_counted_right_when_batches_are_fetched_ahead() -> None:
    passes = Passes()
    loader = wrap(DataLoader(range(21), batch_size=4, num_workers=2), 1, 2, passes=passes)
    next(iter(loader))
    one_pass(loader)
    assert passes.samples == [4, 4, 4, 1]


def test_settings_of_the_loader_are_kept() -> None:
    generator = torch.Generator()
    source = DataLoader(
        range(10),
        batch_size=4,
        collate_fn=tuple,
        generator=generator,
        timeout=0,
        worker_init_fn=print,
    )
    loader = wrap(source, 0, 2)
    assert isinstance(loader, DataLoader)
    assert loader.dataset is source.dataset
    assert (loader.batch_size, loader.collate_fn, loader.generator) == (4, tuple, generator)
    assert (loader.num_workers, loader.pin_memory, loader.worker_init_fn) == (0, False, print)
    assert [*loader] == [(0, 1, 2, 3), (8, 9)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_is_still_told(drop_last: bool) -> None:
    assert wrap(DataLoader(range(10), batch_size=4, drop_last=drop_last), 0, 2).drop_last is drop_last


def test_attributes_of_any_other_iterable_are_its_own() -> None:
    loader = wrap(Bag(10), 0, 2)
    assert loader.classes == 10
    with pytest.raises(AttributeError):
        loader.no_such_thing


# --- what a pass tells ---


def test_a_pass_tells_its_length_its_samples_and_its_end() -> None:
    passes = Passes()
    loader = wrap(DataLoader(range(21), batch_size=4), 1, 2, passes=passes, index=3)
    one_pass(loader)
    one_pass(loader)
    once = [("begin", 3, 3), ("drawn", 4), ("drawn", 4), ("drawn", 1), ("end", 3)]
    assert passes.told == once + once


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (lambda: DataLoader(Stream(5), batch_size=2), [("begin", 0, None), ("drawn", 2), ("drawn", 2), ("drawn", 1)]),
        (lambda: DataLoader(SizedStream(5), batch_size=4), [("begin", 0, 2), ("drawn", 4), ("drawn", 1)]),
        (lambda: Bag(6), [("begin", 0, None), ("drawn", 4), ("drawn", 2)]),
        (list, [("begin", 0, 0)]),
        (lambda: iter([torch.zeros(3)]), [("begin", 0, None), ("drawn", 3)]),
        (lambda: DataLoader(Chunks(6), batch_size=None), [("begin", 0, 2), ("drawn", 4), ("drawn", 2)]),
    ],
)
def test_a_pass_over_other_sources_tells_what_is_known(source: Callable[[], Any], told: list[Any]) -> None:
    passes = Passes()
    one_pass(wrap(source(), passes=passes))
    assert passes.told == [*told, ("end", 0)]


def test_a_batch_is_counted_before_the_script_has_it() -> None:
    passes = Passes()
    for batch in wrap(DataLoader(range(7), batch_size=4), passes=passes):
        assert passes.told[-1] == ("drawn", len(batch))


def test_a_break_is_leaving_and_told_at_once() -> None:
    passes = Passes()
    for _ in wrap(DataLoader(range(20), batch_size=4), passes=passes):
        break
    assert passes.told == [("begin", 0, 5), ("drawn", 4), ("leave", 0)]


def test_a_pass_after_a_break_has_the_next_epochs_order() -> None:
    def make() -> Any:
        return wrap(DataLoader(range(50), batch_size=4, shuffle=True), 0, 2)

    whole, broken = make(), make()
    one_pass(whole)
    next(iter(broken))
    assert one_pass(broken) == one_pass(whole)


def test_an_error_in_the_data_is_leaving_and_comes_through() -> None:
    class Faulty(Dataset[int]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            if index == 5:
                raise ValueError("sample 5 is torn")
            return index

    passes = Passes()
    with pytest.raises(ValueError, match="sample 5 is torn"):
        one_pass(wrap(DataLoader(Faulty(), batch_size=2), passes=passes))
    assert passes.told == [("begin", 0, 5), ("drawn", 2), ("drawn", 2), ("leave", 0)]


def test_when_training_is_over_one_batch_comes_and_counts_nothing() -> None:
    """An epoch without any batch breaks ``total / n`` in scripts."""
    passes = Passes(training=False)
    batches = one_pass(wrap(DataLoader(range(20), batch_size=4), 0, 2, passes=passes))
    assert batches == [[0, 1, 2, 3]]
    assert passes.told == [("begin", 0, 3), ("end", 0)]


def test_a_pass_ends_with_the_batch_in_which_training_ended() -> None:
    passes = Passes(over_after=2)
    assert len(one_pass(wrap(DataLoader(range(20), batch_size=4), passes=passes))) == 2
    assert passes.told[-1] == ("end", 0)


def test_the_users_count_is_asked_where_a_batch_has_no_list_of_numbers() -> None:
    passes = Passes()
    words = [["a", "b", "c"], ["d"]]
    assert list(wrap(words, passes=passes, count=len)) == words
    assert passes.samples == [3, 1]


def test_a_batch_that_cannot_be_counted_is_refused() -> None:
    passes = Passes()
    with pytest.raises(ConfigError, match="cannot count the samples in a batch of type list"):
        list(wrap([["a", "b"], ["c"]], passes=passes))
    assert passes.told[-1] == ("leave", 0)


def test_batches_of_a_plain_loader_need_no_counting() -> None:
    """Their samples have numbers, so texts and anything else can be trained on."""
    passes = Passes()
    words = ["a", "b", "c", "d", "e"]
    loader = wrap(DataLoader(words, batch_size=2, collate_fn=" ".join), passes=passes)
    assert list(loader) == ["a b", "c d", "e"]
    assert passes.samples == [2, 2, 1]


def test_counting_by_default_is_count_samples() -> None:
    passes = Passes()
    batches = [{"x": torch.zeros(3, 2)}, {"x": torch.zeros(1, 2)}]
    list(wrap(batches, passes=passes))
    assert passes.samples == [count_samples(batch) for batch in batches] == [3, 1]


# --- what is refused ---


def test_a_distributed_sampler_is_refused_with_what_to_do() -> None:
    sampler: Any = DistributedSampler(range(10), num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match=r"run\.wrap divides the data itself") as caught:
        wrap(DataLoader(range(10), sampler=sampler))
    assert "leave the sampler out" in caught.value.fix


@pytest.mark.parametrize("thing", [7, object(), None, len])
def test_what_cannot_be_iterated_is_refused_by_its_type(thing: Any) -> None:
    with pytest.raises(ConfigError, match=f"run.wrap got a {type(thing).__name__}; it takes models"):
        wrap(thing)
