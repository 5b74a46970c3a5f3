"""One pass over a loader, and what is told of it to whoever follows the passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, TypeAlias

from paceline.protocol.deals import Deal

Item: TypeAlias = "tuple[Any, int]"  # a batch, and its samples


class Passes(Protocol):
    """Who follows the passes over loaders (the worker); ``loader`` is a number the loader was given."""

    def begin(self, loader: int, length: int | None) -> bool:
        """A pass begins. False: training is over, so one batch is enough."""

    def epoch(self, loader: int) -> int:
        """How many passes over the loader have been trained on: the same on all workers at the same place."""

    def skip(self, loader: int) -> int:
        """How many batches of this worker's part have been trained on by a worker before it in its place."""

    def deal(self, loader: int) -> Deal | None:
        """Which part of the pass is this worker's; None if that never changes."""

    def fetching(self) -> None:
        """The first batch of a pass is about to be fetched; what is drawn at random from here on is its."""

    def border(self) -> None:
        """The script has done with a batch, and asks for the next."""

    def fetched(self, loader: int) -> None:
        """The next of this worker's batches is there, for the first time."""

    def needs_ghost(self, loader: int) -> bool:
        """No batch was left: is this a newcomer, whose script must not find the pass empty?"""

    def drawn(self, loader: int, samples: int) -> None:
        """A batch goes to the script."""

    @property
    def over(self) -> bool:
        """Is training over, so that the pass ends here?"""

    def leases(self, loader: int) -> Leases | None:
        """The leases to draw this pass's batches by, already opened; None where each worker knows its own batches."""

    def more(self, loader: int) -> bool:
        """None is left to draw by lease, or of this worker's part. Blocks until others have given some back, or there
        is a part of another deal (True), or there will be no more."""

    def verdict(self, loader: int) -> bool | None:
        """Did the last push of batches of this loader count, since this was last asked? None if there was none."""

    def pending(self, loader: int) -> Pending | None:
        """The loader's batches that may have to come again; None where every push counts."""

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

    def has_more(self) -> bool | None:
        """Is there another batch for this worker? Then it is kept for it. None if that is not known here."""


class Batches(Protocol):
    """A worker's batches of a pass, each with its samples: by lease, or its own without the first ``skip``."""

    def __call__(self, leases: Leases | None, skip: int = 0, /) -> Iterator[Item]: ...


class Reading:
    """How far the pass in progress over a loader is, for the loader's ``len`` meanwhile."""

    def __init__(self) -> None:
        self._is_open = self._is_ghost = False
        self._given = self._fetched = 0  # batches: to the script in this pass; of the part that is being read
        self._leases: Leases | None = None
        self._again: Sized = ()

    def begin(self, leases: Leases | None, *, is_ghost: bool) -> None:
        """A pass begins. ``is_ghost``: it has one batch."""
        self._is_open, self._is_ghost, self._leases = True, is_ghost, leases
        self._given = self._fetched = 0
        self._again = ()

    def begin_part(self, skipped: int) -> None:
        """A part of the pass begins, of which so many batches are not given."""
        self._fetched = skipped

    def fetched(self) -> None:
        """One more of the part is there."""
        self._fetched += 1

    def gives_again(self, batches: Sized) -> None:
        """These come once more; it may change."""
        self._again = batches

    def given(self) -> None:
        """The script gets a batch."""
        self._given += 1

    def end(self) -> None:
        """The pass is over."""
        self._is_open = False

    def length(self, usual: Callable[[], int], part: Callable[[], int]) -> int:
        """Of a loader: between passes the ``usual``, which all workers see alike; within one as many batches as it
        gives this worker, so that ``number + 1 == len(loader)`` at the last. ``part``: of the part that is being read.
        By lease it is the last if there is none to keep for this worker now."""
        if not self._is_open:
            return usual()
        if self._is_ghost:
            return 1
        if self._leases is None:
            return self._given + len(self._again) + max(part() - self._fetched, 0)
        more = self._leases.has_more()
        if more is None:
            return max(usual(), self._given)
        return max(usual(), self._given + 1) if more or len(self._again) else self._given


class Pending:
    """The batches of one loader that the script has had since its last push. They come again if the next one does not
    count: also those of a pass before, whose gradients the script has gone on to add to."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._before: int | None = 0  # of passes before the one in progress; None once there was a push in it

    def begin(self) -> None:
        """A pass begins."""
        self._before = len(self._items)

    def give(self, item: Item) -> None:
        """The script gets a batch."""
        self._items.append(item)

    def judge(self, *, counted: bool) -> list[Item]:
        """There was a push; those that have to come again."""
        again = [] if counted else self._items
        self._items, self._before = [], None
        return again

    def forget(self) -> None:
        """The pass in progress has changed no gradient: none has its batches, if there was no push."""
        if self._before is not None:
            del self._items[self._before :]


def one_pass(
    loader: Any, index: int, passes: Passes, batches: Batches, reading: Reading | None = None
) -> Iterator[Any]:
    """One pass: tell ``passes`` of its beginning, its batches and its end, however it ends; and the ``reading`` of the
    loader, for its ``len``."""
    reading = reading or Reading()
    reading.end()
    try:
        length = len(loader)
    except TypeError:
        length = None
    training = passes.begin(index, length)
    before = passes.over  # then this is a whole evaluation, or a pass of one batch
    ended = False
    leases = passes.leases(index) if training else None
    reading.begin(leases, is_ghost=not training)
    if training:
        given = _counted(_all(batches, leases, passes, index, reading), passes, index, reading)
    else:
        given = batches(None)
    pending = passes.pending(index) if training else None
    if pending is not None:
        pending.begin()
        given = _with_dropped(given, pending, passes, index, reading)
    try:
        for batch, samples in given:
            if training:
                passes.drawn(index, samples)
            reading.given()
            yield batch
            if training:
                passes.border()
            if not training or (passes.over and not before):
                break
        if training and passes.needs_ghost(index):
            reading.begin(None, is_ghost=True)
            for batch, _ in batches(None):
                yield batch
                break
        ended = True
    finally:
        reading.end()
        if not ended:
            passes.leave(index)
    passes.end(index)


def _counted(batches: Iterator[Item], passes: Passes, index: int, reading: Reading) -> Iterator[Item]:
    for item in batches:
        passes.fetched(index)
        reading.fetched()
        yield item


def _all(batches: Batches, leases: Leases | None, passes: Passes, index: int, reading: Reading) -> Iterator[Item]:
    more = True
    while more:
        skipped = 0 if leases is not None else passes.skip(index)
        reading.begin_part(skipped)
        yield from batches(leases, skipped)
        more = passes.more(index)


def _with_dropped(
    batches: Iterator[Item], pending: Pending, passes: Passes, index: int, reading: Reading
) -> Iterator[Item]:
    """The batches, and those again that a push was made from which did not count."""
    again: deque[Item] = deque()
    reading.gives_again(again)
    while True:
        counted = passes.verdict(index)
        if counted is not None:
            again.extend(pending.judge(counted=counted))
        item = again.popleft() if again else next(batches, None)
        if item is None:
            return
        pending.give(item)
        yield item
