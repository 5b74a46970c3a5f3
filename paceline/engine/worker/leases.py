"""A worker's leases of one loader's batches: the pure ledger, in shared memory, under the run's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.data.ledger import RING, Ledger, words_needed
from paceline.errors import ConfigError
from paceline.transport.lock import Lock
from paceline.transport.segment import Memory


def size_bytes(workers: int) -> int:
    return words_needed(workers) * 8


class Leases:
    """A ``data.passes.Leases``. ``tell`` is called under the lock with how many batches have come back by then."""

    def __init__(
        self, memory: Memory, segment: int, lock: Lock, rank: int, workers: int, tell: Callable[[int], None]
    ) -> None:
        assert lock.journal is not None
        lock.journal.map(segment, memoryview(memory).cast("Q"))
        self._segment = segment
        self._ledger = Ledger(lock.journal.watch(segment, 0, words_needed(workers)), workers)
        self._memory, self._lock, self._rank, self._workers, self._tell = memory, lock, rank, workers, tell
        self._begun = 0  # in this pass
        self._total: int | None = None  # batches of the epoch, once one was drawn by who knows it
        self._secured: int | None = None  # drawn, and not told yet to who draws
        self._is_exhausted = False  # was there none to draw, the last time?

    def of(self, rank: int) -> Leases:
        """The leases of another worker, for whom this process reads."""
        return Leases(self._memory, self._segment, self._lock, rank, self._workers, self._tell)

    def open(self, epoch: int, gone: Sequence[int] | memoryview[int]) -> None:
        """The first batches of the epoch are for those who are not ``gone``, one each."""
        with self._lock:
            present = [worker for worker in range(len(gone)) if not gone[worker]]
            self._ledger.open(epoch, self._rank, present)
            self._tell(self._ledger.returned)
        self._begun, self._secured, self._total, self._is_exhausted = 0, None, None, False

    def draw(self, total: int | None, at_least: int = 0) -> int | None:
        self._total = total
        drawn, self._secured = self._secured, None
        if drawn is None:
            with self._lock:
                drawn = self._ledger.draw(self._rank, total, at_least)
                self._tell(self._ledger.returned)
        self._is_exhausted = drawn is None
        return drawn

    def begin(self) -> bool:
        with self._lock:
            mine = self._ledger.begin(self._rank)
        self._begun += mine
        return mine

    def has_more(self) -> bool | None:
        if self._total is None:
            return None
        with self._lock:
            # Who has been told that there is none does not draw again in this run over the loader.
            has_more, drawn = self._ledger.secure(self._rank, None if self._is_exhausted else self._total)
            self._tell(self._ledger.returned)
        self._secured = drawn if drawn is not None else self._secured
        return has_more

    def drop(self) -> None:
        """What was drawn lies behind the end of the stream."""
        with self._lock:
            self._ledger.drop(self._rank)

    def commit(self) -> None:
        """A push made from all that was begun counts."""
        with self._lock:
            self._ledger.commit(self._rank)

    @property
    def place(self) -> int:
        """How many batches this worker has begun, in all passes."""
        return self._ledger.begun(self._rank)

    @property
    def is_new(self) -> bool:
        """Has no epoch begun?"""
        return self._ledger.is_new

    def left(self) -> tuple[int, int, list[int], int]:
        """Under the lock: what of the epoch does not count; see ``Ledger.left``."""
        return self._ledger.left()

    def refill(self, epoch: int, first: int, before: Sequence[int], committed: int = 0) -> None:
        """Go on with an epoch as ``left`` told it, unless that has been done."""
        with self._lock:
            if epoch >= 0 and self._ledger.is_new:
                self._ledger.refill(epoch, first, before, committed)
                self._tell(self._ledger.returned)

    def settle(self, worker: int, place: int) -> None:
        """Under the lock: what a worker had begun by then counts."""
        self._ledger.commit(worker, place)

    def bury(self, worker: int) -> None:
        """Under the lock: what a worker that has died had and does not count is there for others."""
        self._ledger.give_back(worker, begun=True)
        self._tell(self._ledger.returned)

    def end(self, *, trained: bool) -> None:
        """The pass is over. What was not trained on is there for whoever does. Raises ConfigError if that cannot be."""
        if not trained and self._begun > RING:
            raise ConfigError(
                f"{self._begun} batches were read from a wrapped loader without a step; {RING} can be taken back",
                why="with --assign lease a batch that a worker reads is a batch that the others do not",
                fix="read it in evaluation mode (model.eval(), or with torch.no_grad()), or use --assign round_robin",
            )
        with self._lock:
            self._give_back(begun=not trained)
            if trained:
                self._ledger.commit(self._rank)

    def forgo(self) -> None:
        """Leave what was drawn and not begun to others. The caller holds the lock."""
        self._give_back(begun=False)

    def _give_back(self, *, begun: bool) -> None:
        self._ledger.give_back(self._rank, begun=begun)
        self._tell(self._ledger.returned)
