"""The user's loader, rebuilt so that each worker draws its own part of one global order.

Every worker computes the same global order from the run's seed and the epoch, and takes what ``assign`` gives
it; nobody needs to be asked. A loader of one process is never touched: ``python train.py`` draws what it always
did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from paceline.data.count import count_samples
from paceline.data.part import Part
from paceline.data.passes import Leases, Passes, Reading, one_pass
from paceline.data.plan import Plan
from paceline.errors import ConfigError

Count = Callable[[Any], int]


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

    Between passes ``len`` is the same on all workers where batches are dealt in turn: ceil(batches / workers). Within a
    pass it is how many batches that gives (``Reading.length``).
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
        self._plan: Plan | None = None
        self._reading = Reading()
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
            self._plan = Plan(source, part, orders, index)
            if self._plan.by_batch_of_one:
                settings |= {"batch_size": None, "sampler": self._plan}
            else:
                settings["batch_sampler"] = self._plan
        super().__init__(source.dataset, **settings)
        for name in ("batch_size", "drop_last"):  # scripts read them; DataLoader forbids to set them
            object.__setattr__(self, name, getattr(source, name))

    def __len__(self) -> int:
        return self._reading.length(self._usual_length, self.dealt)

    def _usual_length(self) -> int:
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        if self._plan is not None:
            return self._plan.length(epoch, part)
        part = replace(part, assign="round_robin") if part.assign == "block" else part
        return part.count(len(self._source), epoch)

    def dealt(self) -> int:
        """How many batches the worker's part of the pass in progress has."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        if self._plan is not None:
            return self._plan.dealt(epoch, part)
        return _count_streamed(part, self._index, epoch, len(self._source), None)

    def __iter__(self) -> Any:
        return one_pass(self, self._index, self._passes, self.batches, self._reading)

    def batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        """This worker's batches of a pass, each with its samples; tells nobody."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        if self._plan is None:
            self._passes.fetching()
            batches, deal = part.rest(self._index, epoch, super().__iter__(), None), part.deal(self._index, epoch)
            yield from islice(_streamed(batches, part, epoch, None, self._count, leases, deal), skip, None)
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
        self._reading = Reading()

    def __len__(self) -> int:
        return self._reading.length(self._usual_length, self.dealt)

    def _usual_length(self) -> int:
        part = self._part.of(self._passes.deal(self._index))
        return part.count(len(self._source), self._passes.epoch(self._index))  # type: ignore[arg-type]

    def dealt(self) -> int:
        """How many batches the worker's part of the pass in progress has."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        total = len(self._source)  # type: ignore[arg-type]
        return _count_streamed(part, self._index, epoch, total, total)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Any]:
        return one_pass(self, self._index, self._passes, self.batches, self._reading)

    def batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        """This worker's batches of a pass, each with its samples; tells nobody."""
        epoch, part = self._passes.epoch(self._index), self._part.of(self._passes.deal(self._index))
        total = len(self._source) if isinstance(self._source, Sized) else None
        self._passes.fetching()
        batches, deal = part.rest(self._index, epoch, self._source, total), part.deal(self._index, epoch)
        return islice(_streamed(batches, part, epoch, total, self._count, leases, deal), skip, None)


def _count_streamed(part: Part, index: int, epoch: int, batches: int, total: int | None) -> int:
    """How many of a stream's ``batches`` are the part's; ``total`` as in ``Part.owns_batch``."""
    if not part.trained_in(index, epoch):
        part = replace(part, assign="round_robin") if part.assign == "block" and total is None else part
        return part.dealt(batches, epoch)
    deal, left = part.deal(index, epoch), part.rest(index, epoch, range(batches), total)
    return sum(part.owns_batch(ordinal, total, epoch, deal) for ordinal, _ in enumerate(left))


def _streamed(
    batches: Iterable[Any],
    part: Part,
    epoch: int,
    total: int | None,
    count: Count,
    leases: Leases | None,
    deal: int = 0,
) -> Iterator[tuple[Any, int]]:
    """This worker's batches of a stream, which it can only read from its beginning to its end."""
    wanted = leases.draw(None) if leases is not None else None
    for ordinal, batch in enumerate(batches):
        if leases is None:
            if part.owns_batch(ordinal, total, epoch, deal):
                yield batch, count(batch)
        elif ordinal == wanted:
            leases.begin()
            yield batch, count(batch)
            wanted = leases.draw(None, ordinal + 1)
    if leases is not None and wanted is not None:
        leases.drop()
