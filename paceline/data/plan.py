"""Which samples make which batches: an epoch's global order, cut as the user's loader cuts it, and a worker's part.

Everybody computes the same order from the run's seed and the epoch, also where the sampler is the user's own: it is
asked once an epoch, with random numbers seeded alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from paceline.data.assign import epoch_seed
from paceline.data.part import Part
from paceline.data.passes import Leases
from paceline.data.seeds import seeded


class Plan:
    """The sampler of a ``SharedLoader``: lists of sample numbers, this worker's, for the epoch it was told.

    A loader with ``batch_size=None`` (its data set yields batches) gives single numbers instead.
    """

    def __init__(
        self, source: DataLoader[Any], part: Part, orders: dict[int, Any] | None = None, index: int = 0
    ) -> None:
        self._orders: dict[int, Any] = {} if orders is None else orders  # epoch -> what the user's sampler drew
        self._source, self._part, self._epoch, self._index = source, part, 0, index
        self._counts: deque[int | None] = deque()
        self._drawn: tuple[object, list[Any]] = (None, [])
        self._held: tuple[object, int] = (None, 0)  # scripts ask for len at every batch
        self._dealt: tuple[object, int] = (None, 0)
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
        if self._held[0] != (epoch, part):
            total = len(self._source.dataset)  # type: ignore[arg-type]
            self._held = ((epoch, part), _count_batches(sampler, part.count(total, epoch)))
        return self._held[1]

    def dealt(self, epoch: int, part: Part) -> int:
        """How many batches this part of an epoch gives, skipped ones included."""
        sampler = self._source.batch_sampler
        if not self._is_plain(sampler):
            return len(self._listed(epoch, part))
        if not part.trained_in(self._index, epoch):
            is_dealt = part.assign == "round_robin"
            return part.dealt(len(self._source), epoch) if is_dealt else self.length(epoch, part)
        if self._dealt[0] != (epoch, part):
            self._dealt = ((epoch, part), sum(1 for _ in self._cut(sampler, epoch, part)))
        return self._dealt[1]

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
        sampler, everything = self._source.batch_sampler, self._part.whole
        if self._is_plain(sampler):
            order = self._rest(self._order(sampler.sampler, epoch), sampler, epoch, everything)
            total = _count_batches(sampler, len(order))
            while (ordinal := leases.draw(total)) is not None:
                yield _batch(order, sampler, ordinal)
            return
        listed = Plan(self._source, everything, self._orders, self._index)._listed(epoch, everything)
        while (ordinal := leases.draw(len(listed))) is not None:
            yield listed[ordinal]

    def _listed(self, epoch: int, part: Part) -> list[Any]:
        """A part's batches by a sampler of the user's, drawn once an epoch: its length is known only then."""
        if self._drawn[0] != (epoch, part):
            sampler = self._source.batch_sampler
            if type(sampler) is BatchSampler:
                batches = list(self._cut(sampler, epoch, part))
            else:
                drawn = self._draw(self._source.sampler if sampler is None else sampler, epoch)
                drawn = part.rest_of(self._index, epoch, drawn)
                batches = [drawn[ordinal] for ordinal in self._owned(part, len(drawn), epoch)]
            self._drawn = ((epoch, part), batches)
        return self._drawn[1]

    def _cut(self, sampler: BatchSampler, epoch: int, part: Part, skip: int = 0) -> Iterator[Any]:
        """Batches as ``sampler`` cuts them: of the part's own samples, or whole ones of the global order; without the
        first ``skip``."""
        order = self._rest(self._order(sampler.sampler, epoch), sampler, epoch, part)
        if part.assign == "round_robin" or not isinstance(order, np.ndarray):
            ordinals = self._owned(part, _count_batches(sampler, len(order)), epoch)
            return (_batch(order, sampler, ordinal) for ordinal in ordinals[skip:])
        total = len(self._source.dataset)  # type: ignore[arg-type]
        held = order[part.mine(order, total, epoch, part.deal(self._index, epoch))].tolist()
        return iter(BatchSampler(held[skip * sampler.batch_size :], sampler.batch_size, sampler.drop_last))

    def _owned(self, part: Part, batches: int, epoch: int) -> list[int]:
        """The ordinals of a part's batches, of so many that are to be dealt."""
        mine = part.mine(np.arange(batches), batches, epoch, part.deal(self._index, epoch))
        return np.flatnonzero(mine).tolist()

    def _rest(self, order: Any, sampler: BatchSampler, epoch: int, part: Part) -> Any:
        """Of an epoch's order, what is still to be dealt."""
        total = len(self._source.dataset)  # type: ignore[arg-type]
        for trained in part.trained_in(self._index, epoch):
            if isinstance(order, np.ndarray):
                order = trained.samples_left(order, sampler.batch_size, total)
            else:
                batches = [_batch(order, sampler, ordinal) for ordinal in range(_count_batches(sampler, len(order)))]
                order = [number for batch in trained.batches_left(batches, len(batches)) for number in batch]
        return order

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
            with seeded(epoch_seed(self._part.seed, epoch)):
                drawn = list(sampler)
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = drawn
        return list(self._orders[epoch])


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
