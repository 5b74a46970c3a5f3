"""One pass over a loader, and what is told of it to whoever follows the passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol


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
