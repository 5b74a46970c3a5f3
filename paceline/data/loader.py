"""The user's loader, rebuilt so that each worker draws its own part of one global order.

Every worker computes the same global order from the run's seed and the epoch, and takes what ``assign`` gives
it; nobody needs to be asked. A loader of one process is never touched: ``python train.py`` draws what it always
did.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from paceline.data.assign import epoch_seed, owners
from paceline.data.count import count_samples
from paceline.data.trained import Trained
from paceline.errors import ConfigError

Count = Callable[[Any], int]


class Passes(Protocol):
    """Who follows the passes over loaders (the worker); ``loader`` is a number the loader was given."""

    def begin(self, loader: int, length: int | None) -> bool:
        """A pass begins. False: training is over, so one batch is enough."""

    def epoch(self, loader: int) -> int:
        """How many passes over the loader have been trained on: the same on all workers at the same place."""

    def skip(self, loader: int) -> int:
        """How many of this worker's batches of the pass have been trained on by a worker before it in its place."""

    def deal(self, loader: int) -> tuple[int, int] | None:
        """Which part of the pass is this worker's (-1: none), of how many; None if that never changes."""

    def fetching(self) -> None:
        """The first batch of a pass is about to be fetched; what is drawn at random from here on is its."""

    def border(self) -> None:
        """The script has done with a batch, and asks for the next."""

    def fetched(self, loader: int) -> None:
        """The next of this worker's batches is there, for the first time."""

    def needs_ghost(self, loader: int) -> bool:
        """No batch was left: is this a newcomer, whose script must not find the pass empty?"""

    def drawn(self, samples: int) -> None:
        """A batch goes to the script."""

    @property
    def over(self) -> bool:
        """Is training over, so that the pass ends here?"""

    def leases(self, loader: int) -> Leases | None:
        """The leases to draw this pass's batches by, already opened; None where each worker knows its own batches."""

    def more(self, loader: int) -> bool:
        """None is left to draw by lease. Blocks until others have given some back (True), or can do so no more."""

    def verdict(self, loader: int) -> bool | None:
        """Did the last push of batches of this loader count, since this was last asked? None if there was none."""

    @property
    def may_drop(self) -> bool:
        """May a push come to nothing, so that its batches have to come again?"""

    def end(self, loader: int) -> None:
        """The script has come to the pass's end. Blocks until all workers have."""

    def leave(self, loader: int) -> None:
        """The script has left the pass early. Does not block."""


class Leases(Protocol):
    """Batches by ordinal, drawn by whoever comes first; see ``data/ledger.py``."""

    def draw(self, total: int | None, at_least: int = 0) -> int | None:
        """The ordinal of a batch to fetch, not before ``at_least``; None if there is none left."""

    def drop(self) -> None:
        """The batch that was drawn last lies behind the stream's end."""

    def begin(self) -> bool:
        """The oldest batch drawn goes to the script. False: another worker has it now."""


class Batches(Protocol):
    """A worker's batches of a pass, each with its samples: by lease, or its own without the first ``skip``."""

    def __call__(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]: ...


@dataclass(frozen=True)
class Part:
    """Which part of an epoch is this worker's, where it is not drawn by lease: number ``rank`` of so many."""

    rank: int
    workers: int
    assign: str
    seed: int
    trained: tuple[Trained | None, ...] = ()  # by loader: what a resumed run had trained on in its epoch

    def of(self, deal: tuple[int, int] | None) -> Part:
        """The same for a pass that is dealt so; see ``Passes.deal``."""
        return self if deal is None else replace(self, rank=deal[0], workers=deal[1])

    def left_of(self, loader: int, epoch: int) -> Trained | None:
        """What of this epoch need not be dealt any more."""
        trained = self.trained[loader] if loader < len(self.trained) else None
        return trained if trained is not None and trained.epoch == epoch else None

    def mine(self, numbers: np.ndarray, total: int, epoch: int) -> np.ndarray:
        """bool[k]: which of ``numbers`` (int64[k], of ``total``) are this worker's in this epoch."""
        owner = owners(self.assign, numbers, total, self.workers, self.seed, epoch)
        return np.asarray(owner == self.rank)

    def count(self, batches: int, epoch: int) -> int:
        """How many of an epoch's ``batches`` are this worker's, or may be where they are dealt in turn."""
        if self.assign == "round_robin":
            return -(-batches // self.workers)
        return int(self.mine(np.arange(batches), batches, epoch).sum())

    def rest(self, loader: int, epoch: int, batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        """Of all batches of an epoch, those that are still to be dealt."""
        trained = self.left_of(loader, epoch)
        return batches if trained is None else trained.batches_left(batches, total)

    def owns_batch(self, ordinal: int, total: int | None, epoch: int) -> bool:
        assign = "round_robin" if self.assign == "block" and total is None else self.assign
        number = np.array([ordinal], dtype=np.int64)
        owner = owners(assign, number, total or 1, self.workers, self.seed, epoch)
        return bool(owner[0] == self.rank)


def share(
    loader: Any, index: int, part: Part, passes: Passes, count: Count | None, orders: dict[int, Any] | None = None
) -> Any:
    """The worker's version of any loader. Raises ConfigError for one that divides the data itself.

    ``orders`` is common to versions of one loader in one process: its sampler is then asked once an epoch for all.
    """
    if not isinstance(loader, DataLoader):
        return SharedBatches(loader, index, part, passes, count or count_samples)
    if isinstance(loader.sampler, DistributedSampler):
        raise ConfigError(
            "the loader has a DistributedSampler; run.wrap divides the data itself",
            fix="leave the sampler out: DataLoader(dataset, batch_size=..., shuffle=True)",
        )
    return SharedLoader(loader, index, part, passes, count or count_samples, orders)


class SharedLoader(DataLoader[Any]):
    """A DataLoader over this worker's part of ``source``'s batches; the same settings otherwise.

    ``len`` is the same on all workers where batches are dealt in turn: ceil(batches / workers).
    """

    def __init__(
        self,
        source: DataLoader[Any],
        index: int,
        part: Part,
        passes: Passes,
        count: Count,
        orders: dict[int, Any] | None = None,
    ) -> None:
        self._index, self._passes, self._count, self._source, self._part = index, passes, count, source, part
        self._plan: _Plan | None = None
        settings: dict[str, Any] = {
            "num_workers": source.num_workers,
            "collate_fn": source.collate_fn,
            "pin_memory": source.pin_memory,
            "timeout": source.timeout,
            "worker_init_fn": source.worker_init_fn,
            "multiprocessing_context": source.multiprocessing_context,
            "generator": source.generator,
        }
        if source.num_workers:
            settings["prefetch_factor"] = source.prefetch_factor
            settings["persistent_workers"] = source.persistent_workers
        batch_size = source.batch_size
        if isinstance(source.dataset, IterableDataset):
            settings |= {"batch_size": batch_size, "drop_last": source.drop_last}
        else:
            self._plan = _Plan(source, part, orders, index)
            if self._plan.by_batch_of_one:
                settings |= {"batch_size": None, "sampler": self._plan}
            else:
                settings["batch_sampler"] = self._plan
        super().__init__(source.dataset, **settings)
        for name in ("batch_size", "drop_last"):  # scripts read them; DataLoader forbids to set them
            object.__setattr__(self, name, getattr(source, name))

    def __len__(self) -> int:
        part = self._part.of(self._passes.deal(self._index))
        if self._plan is not None:
            return self._plan.length(self._passes.epoch(self._index), part)
        part = replace(part, assign="round_robin") if part.assign == "block" else part
        return part.count(len(self._source), self._passes.epoch(self._index))

    def __iter__(self) -> Any:
        return one_pass(self, self._index, self._passes, self.batches)

    def batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        """This worker's batches of a pass, each with its samples; tells nobody."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        if self._plan is None:
            self._passes.fetching()
            batches = part.rest(self._index, epoch, super().__iter__(), None)
            yield from islice(_streamed(batches, part, epoch, None, self._count, leases), skip, None)
            return
        counts = self._plan.start(epoch, part, leases, skip, self._passes.fetching)
        for batch in super().__iter__():
            known = counts.popleft()
            if leases is None or leases.begin():
                yield batch, self._count(batch) if known is None else known


class SharedBatches:
    """Any other iterable of batches, dealt by batch; everything else is the iterable's own."""

    def __init__(self, source: Iterable[Any], index: int, part: Part, passes: Passes, count: Count) -> None:
        if not hasattr(source, "__iter__"):
            raise ConfigError(
                f"run.wrap got a {type(source).__name__}; it takes models, optimizers, schedulers and loaders "
                "(anything one can iterate over)"
            )
        self._source, self._index, self._part, self._passes, self._count = source, index, part, passes, count

    def __len__(self) -> int:
        part = self._part.of(self._passes.deal(self._index))
        return part.count(len(self._source), self._passes.epoch(self._index))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Any]:
        return one_pass(self, self._index, self._passes, self.batches)

    def batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        """This worker's batches of a pass, each with its samples; tells nobody."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        total = len(self._source) if isinstance(self._source, Sized) else None
        self._passes.fetching()
        batches = part.rest(self._index, epoch, self._source, total)
        return islice(_streamed(batches, part, epoch, total, self._count, leases), skip, None)


def one_pass(loader: Any, index: int, passes: Passes, batches: Batches) -> Iterator[Any]:
    """One pass: tell ``passes`` of its beginning, its batches and its end, however it ends."""
    try:
        length = len(loader)
    except TypeError:
        length = None
    training = passes.begin(index, length)
    before = passes.over  # then this is a whole evaluation, or a pass of one batch
    ended = False
    leases = passes.leases(index) if training else None
    if leases is not None:
        given = _counted(_leased(batches, leases, lambda: passes.more(index)), passes, index)
    elif training:
        given = _counted(batches(None, passes.skip(index)), passes, index)
    else:
        given = batches(None)
    try:
        for batch, samples in _with_dropped(given, passes, index) if passes.may_drop else given:
            if training:
                passes.drawn(samples)
            yield batch
            if training:
                passes.border()
            if not training or (passes.over and not before):
                break
        if training and passes.needs_ghost(index):
            for batch, _ in batches(None):
                yield batch
                break
        ended = True
    finally:
        if not ended:
            passes.leave(index)
    passes.end(index)


def _counted(batches: Iterator[tuple[Any, int]], passes: Passes, index: int) -> Iterator[tuple[Any, int]]:
    for item in batches:
        passes.fetched(index)
        yield item


def _leased(batches: Batches, leases: Leases, more: Callable[[], bool]) -> Iterator[tuple[Any, int]]:
    yield from batches(leases)
    while more():
        yield from batches(leases)


def _with_dropped(batches: Iterator[tuple[Any, int]], passes: Passes, index: int) -> Iterator[tuple[Any, int]]:
    """The batches, and those again that a push was made from which did not count."""
    again: deque[tuple[Any, int]] = deque()
    pending: list[tuple[Any, int]] = []  # given since the last push
    passes.verdict(index)
    while (item := again.popleft() if again else next(batches, None)) is not None:
        pending.append(item)
        yield item
        counted = passes.verdict(index)
        if counted is not None:
            if not counted:
                again.extend(pending)
            pending = []


def _streamed(
    batches: Iterable[Any], part: Part, epoch: int, total: int | None, count: Count, leases: Leases | None
) -> Iterator[tuple[Any, int]]:
    """This worker's batches of a stream, which it can only read from its beginning to its end."""
    wanted = leases.draw(None) if leases is not None else None
    for ordinal, batch in enumerate(batches):
        if leases is None:
            if part.owns_batch(ordinal, total, epoch):
                yield batch, count(batch)
        elif ordinal == wanted:
            leases.begin()
            yield batch, count(batch)
            wanted = leases.draw(None, ordinal + 1)
    if leases is not None and wanted is not None:
        leases.drop()


class _Plan:
    """The sampler of a SharedLoader: lists of sample numbers, this worker's, for the epoch it was told.

    A loader with ``batch_size=None`` (its data set yields batches) gives single numbers instead.
    """

    def __init__(
        self, source: DataLoader[Any], part: Part, orders: dict[int, Any] | None = None, index: int = 0
    ) -> None:
        self._orders: dict[int, Any] = {} if orders is None else orders  # epoch -> what the user's sampler drew
        self._source, self._part, self._epoch, self._index = source, part, 0, index
        self._counts: deque[int | None] = deque()
        self._drawn: tuple[object, list[Any]] = (None, [])
        self._leases: Leases | None = None
        self._skip = 0
        self._before: Callable[[], None] = lambda: None
        self.by_batch_of_one = source.batch_sampler is None

    def start(
        self,
        epoch: int,
        part: Part,
        leases: Leases | None = None,
        skip: int = 0,
        before: Callable[[], None] = lambda: None,
    ) -> deque[int | None]:
        """From now on ``iter`` gives this part of this epoch, without the first ``skip`` batches; the sample counts of
        its batches appear in the answer, in order. ``before`` is called before the first."""
        self._epoch, self._part, self._leases, self._skip, self._before = epoch, part, leases, skip, before
        self._counts = deque()
        return self._counts

    def __iter__(self) -> Iterator[Any]:
        counts = self._counts
        self._before()
        for batch in self._mine(self._epoch, self._skip):
            counts.append(None if self.by_batch_of_one else len(batch))
            yield batch

    def __len__(self) -> int:
        return self.length(self._epoch, self._part)

    def length(self, epoch: int, part: Part) -> int:
        """How many batches the worker has in this part of an epoch, or at most has where they are dealt in turn."""
        sampler = self._source.batch_sampler
        if part.assign == "round_robin":
            return part.count(len(self._source), epoch)
        if not self._is_plain(sampler):
            return len(self._listed(epoch, part))
        total = len(self._source.dataset)  # type: ignore[arg-type]
        held = part.count(total, epoch)
        return held // sampler.batch_size if sampler.drop_last else -(-held // sampler.batch_size)

    def _is_plain(self, sampler: Any) -> TypeGuard[BatchSampler]:
        """Are the batches cut from all samples, in order or shuffled by the run's seed?"""
        if type(sampler) is not BatchSampler:
            return False
        drawn = sampler.sampler
        return type(drawn) is SequentialSampler or (type(drawn) is RandomSampler and _is_plain_shuffle(drawn))

    def _mine(self, epoch: int, skip: int) -> Iterator[Any]:
        sampler = self._source.batch_sampler
        if self._leases is not None:
            return islice(self._leased(self._leases, epoch), skip, None)
        if self._is_plain(sampler):
            return self._cut(sampler, epoch, self._part, skip)
        return iter(self._listed(epoch, self._part)[skip:])

    def _leased(self, leases: Leases, epoch: int) -> Iterator[Any]:
        sampler, everything = self._source.batch_sampler, Part(0, 1, "round_robin", self._part.seed)
        if self._is_plain(sampler):
            order = self._rest(self._order(sampler.sampler, epoch), sampler, epoch)
            total = _count_batches(sampler, len(order))
            while (ordinal := leases.draw(total)) is not None:
                yield _batch(order, sampler, ordinal)
            return
        listed = _Plan(self._source, everything, self._orders, self._index)._listed(epoch, everything)
        while (ordinal := leases.draw(len(listed))) is not None:
            yield listed[ordinal]

    def _listed(self, epoch: int, part: Part) -> list[Any]:
        """A part's batches by a sampler of the user's, drawn once an epoch: its length is known only then."""
        if self._drawn[0] != (epoch, part.rank, part.workers):
            sampler = self._source.batch_sampler
            if type(sampler) is BatchSampler:
                batches = list(self._cut(sampler, epoch, part))
            else:
                drawn = self._draw(self._source.sampler if sampler is None else sampler, epoch)
                drawn = list(part.rest(self._index, epoch, drawn, len(drawn)))
                batches = [drawn[ordinal] for ordinal in _owned(part, len(drawn), epoch)]
            self._drawn = ((epoch, part.rank, part.workers), batches)
        return self._drawn[1]

    def _cut(self, sampler: BatchSampler, epoch: int, part: Part, skip: int = 0) -> Iterator[Any]:
        """Batches as ``sampler`` cuts them: of the part's own samples, or whole ones of the global order; without the
        first ``skip``."""
        order = self._rest(self._order(sampler.sampler, epoch), sampler, epoch)
        if part.assign == "round_robin" or not isinstance(order, np.ndarray):
            ordinals = _owned(part, _count_batches(sampler, len(order)), epoch)
            return (_batch(order, sampler, ordinal) for ordinal in ordinals[skip:])
        total = len(self._source.dataset)  # type: ignore[arg-type]
        held = order[part.mine(order, total, epoch)].tolist()
        return iter(BatchSampler(held[skip * sampler.batch_size :], sampler.batch_size, sampler.drop_last))

    def _rest(self, order: Any, sampler: BatchSampler, epoch: int) -> Any:
        """Of an epoch's order, what is still to be dealt."""
        trained = self._part.left_of(self._index, epoch)
        if trained is None:
            return order
        if not isinstance(order, np.ndarray):
            batches = [_batch(order, sampler, ordinal) for ordinal in range(_count_batches(sampler, len(order)))]
            return [number for batch in trained.batches_left(batches, len(batches)) for number in batch]
        total = len(self._source.dataset)  # type: ignore[arg-type]
        return trained.samples_left(order, sampler.batch_size, total)

    def _order(self, sampler: Any, epoch: int) -> Any:
        """The epoch's global order: int64[n] where samples are numbers, else a list."""
        seed = epoch_seed(self._part.seed, epoch)
        if type(sampler) is SequentialSampler:
            return np.arange(len(sampler))
        if type(sampler) is RandomSampler and _is_plain_shuffle(sampler):
            return torch.randperm(len(sampler), generator=torch.Generator().manual_seed(seed)).numpy()
        drawn = self._draw(sampler, epoch)
        if all(isinstance(number, int | np.integer) and number >= 0 for number in drawn):
            return np.array(drawn, dtype=np.int64)
        return drawn

    def _draw(self, sampler: Any, epoch: int) -> list[Any]:
        """What a sampler of the user's gives in this epoch; asked once, since it may have a state of its own."""
        if epoch not in self._orders:
            with _seeded(epoch_seed(self._part.seed, epoch)):
                drawn = list(sampler)
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = drawn
        return list(self._orders[epoch])


def _owned(part: Part, batches: int, epoch: int) -> list[int]:
    """The ordinals of a part's batches, of so many."""
    return np.flatnonzero(part.mine(np.arange(batches), batches, epoch)).tolist()


def _count_batches(sampler: BatchSampler, samples: int) -> int:
    size = sampler.batch_size
    return samples // size if sampler.drop_last else -(-samples // size)


def _batch(order: Any, sampler: BatchSampler, ordinal: int) -> Any:
    size = sampler.batch_size
    batch = order[ordinal * size : (ordinal + 1) * size]
    return batch.tolist() if isinstance(batch, np.ndarray) else batch


def _is_plain_shuffle(sampler: RandomSampler) -> bool:
    """A shuffle with no generator of the user's: then the run's seed decides."""
    return not sampler.replacement and sampler.generator is None and sampler.num_samples == len(sampler.data_source)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Samplers of any kind draw the same on every worker in here; the script's own random numbers stay."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
