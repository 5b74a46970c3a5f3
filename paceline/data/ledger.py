"""The ledger of one loader: which batches of an epoch are whose, when samples are dealt out by lease.

A lease is a whole batch, by its ordinal in the epoch's global order. It is *drawn* when the worker's loader asks for
the batch (ahead of time, where it prefetches), *begun* when the script gets it, and *committed* when a push made from
it counts. Whoever is faster draws more; but every worker has one batch of each epoch for itself, so that no loop finds
an epoch empty. When no batch is left to draw, those that others have drawn but not begun are taken back, each once.

The ledger is pure: words in memory that all workers map, or a list in a test; every call is made under the run's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from typing import TypeAlias

Words: TypeAlias = "MutableSequence[int] | memoryview[int]"

RING = 1024  # leases of one worker that are not committed; what is begun beyond that counts as committed
_HEADER = 8
_EPOCH, _NEXT, _COMMITTED, _RETURNED = 0, 1, 2, 3
# Of a worker's ring: the oldest lease not committed, the oldest not begun, the end; 1 + the batch kept for it.
_FIRST, _BEGUN, _END, _KEPT = 0, 1, 2, 3
_WORKER = 4 + RING
_TAKEN, _FINAL = 1, 2  # flags of a lease: another worker has it now; it was taken once, and is not taken again


def words_needed(workers: int) -> int:
    return _HEADER + workers * RING + workers * _WORKER


class Ledger:
    """The ledger over ``words``, zeros at first."""

    def __init__(self, words: Words, workers: int) -> None:
        self._words, self._workers = words, workers

    @property
    def committed(self) -> int:
        """Batches of this epoch that count."""
        return self._words[_COMMITTED]

    @property
    def returned(self) -> int:
        """Batches on the table that were drawn before."""
        return self._words[_RETURNED]

    @property
    def is_new(self) -> bool:
        """Has no epoch begun?"""
        return not self._words[_EPOCH]

    def left(self) -> tuple[int, int, list[int], int]:
        """(the epoch, the first batch that was never drawn, those before it that do not count, how many count). Behind
        the end of the data lie some that do neither."""
        words = self._words
        back = {words[place] >> 2 for place in range(_HEADER, _HEADER + words[_RETURNED])}
        for worker in range(self._workers):
            start = self._start(worker)
            back |= {lease >> 2 for lease in self._leases(worker, words[start + _FIRST], words[start + _END])}
            back |= {words[start + _KEPT] - 1} if words[start + _KEPT] else set()
        return words[_EPOCH] - 1, words[_NEXT], sorted(back), words[_COMMITTED]

    def refill(self, epoch: int, first: int, before: Sequence[int], committed: int = 0) -> None:
        """As ``left`` told it, for whoever comes first."""
        words = self._words
        words[_EPOCH], words[_NEXT], words[_COMMITTED] = epoch + 1, first, committed
        room = self._workers * RING
        if len(before) > room:
            raise ValueError(f"{len(before)} batches were out, {room} can be taken back")
        for place, ordinal in enumerate(before):
            words[_HEADER + place] = ordinal << 2
        words[_RETURNED] = len(before)

    def open(self, epoch: int, worker: int, present: Sequence[int]) -> None:
        """``worker`` begins a pass: the first to begin a new epoch puts all its batches on the table, but the first
        ones, which are for those ``present``."""
        words, start = self._words, self._start(worker)
        if words[_EPOCH] != epoch + 1:
            words[_EPOCH] = epoch + 1
            words[_NEXT], words[_COMMITTED], words[_RETURNED] = len(present), 0, 0
            for ordinal, one in enumerate(present):
                words[self._start(one) + _KEPT] = ordinal + 1
        words[start + _FIRST] = words[start + _BEGUN] = words[start + _END]

    def draw(self, worker: int, total: int | None, at_least: int = 0) -> int | None:
        """A batch for ``worker``, of ``total`` (None: nobody knows how many there are), not before ``at_least`` (for
        streams, which do not go back); None if none is left."""
        words, start = self._words, self._start(worker)
        kept, words[start + _KEPT] = words[start + _KEPT] - 1, 0
        if kept >= at_least and (total is None or kept < total):
            lease = kept << 2 | _FINAL  # nobody takes it back: no loop finds an epoch empty
        elif (returned := self._returned(at_least, total)) is not None:
            lease = returned
        elif total is None or words[_NEXT] < total:
            lease = words[_NEXT] << 2
            words[_NEXT] += 1
        else:
            found = self._take_back(worker)
            if found is None:
                return None
            lease = found << 2 | _FINAL
        self._append(worker, lease)
        return lease >> 2

    def secure(self, worker: int, total: int | None) -> tuple[bool, int | None]:
        """See to it that ``worker`` has a batch before it that nobody takes back. Is there one? If it had drawn none,
        the one that is drawn now, where there is a ``total``."""
        words, start = self._words, self._start(worker)
        drawn = None
        for place in range(words[start + _BEGUN], words[start + _END]):
            if not words[start + 4 + place % RING] & _TAKEN:
                break
        else:
            drawn = self.draw(worker, total) if total is not None else None
            if drawn is None:
                return False, None
            place = words[start + _END] - 1
        words[start + 4 + place % RING] |= _FINAL
        return True, drawn

    def _returned(self, at_least: int, total: int | None) -> int | None:
        """The first batch of those that came back, which is then gone from them."""
        words = self._words
        while True:
            places = range(_HEADER, _HEADER + words[_RETURNED])
            found = min(((words[place], place) for place in places if words[place] >> 2 >= at_least), default=None)
            if found is None:
                return None
            words[_RETURNED] -= 1
            words[found[1]] = words[_HEADER + words[_RETURNED]]
            if total is None or found[0] >> 2 < total:  # what was kept for a worker may never have been there
                return found[0]

    def begin(self, worker: int) -> bool:
        """The oldest batch that ``worker`` has drawn goes to the script; False if another worker has it now."""
        words, start = self._words, self._start(worker)
        place = words[start + _BEGUN]
        words[start + _BEGUN] = place + 1
        return not words[start + 4 + place % RING] & _TAKEN

    def drop(self, worker: int) -> None:
        """The last batch that ``worker`` has drawn is not there: it lies behind a stream's end."""
        self._words[self._start(worker) + _END] -= 1

    def begun(self, worker: int) -> int:
        """How many batches ``worker`` has begun, in all epochs."""
        return self._words[self._start(worker) + _BEGUN]

    def commit(self, worker: int, place: int | None = None) -> None:
        """All that ``worker`` has begun counts; with ``place`` what it had begun when ``begun`` was that."""
        words, start = self._words, self._start(worker)
        first, stop = words[start + _FIRST], words[start + _BEGUN]
        stop = stop if place is None else min(stop, max(place, first))
        words[_COMMITTED] += sum(1 for _ in self._leases(worker, first, stop))
        words[start + _FIRST] = stop

    def give_back(self, worker: int, *, begun: bool) -> None:
        """What ``worker`` has drawn but not begun is on the table again; with ``begun`` also what it has begun."""
        words, start = self._words, self._start(worker)
        first = words[start + _FIRST] if begun else words[start + _BEGUN]
        kept, words[start + _KEPT] = words[start + _KEPT], 0
        for lease in (*self._leases(worker, first, words[start + _END]), *([kept - 1 << 2] if kept else ())):
            assert words[_RETURNED] < self._workers * RING, "more batches came back than there is room for"
            words[_HEADER + words[_RETURNED]] = lease
            words[_RETURNED] += 1
        words[start + _END] = first
        words[start + _BEGUN] = min(words[start + _BEGUN], first)

    def _take_back(self, worker: int) -> int | None:
        """The last batch that another worker has drawn and not begun."""
        words = self._words
        for other in range(self._workers):
            start = self._start(other)
            for place in range(words[start + _END] - 1, words[start + _BEGUN] - 1, -1):
                lease = words[start + 4 + place % RING]
                if other != worker and not lease & (_TAKEN | _FINAL):
                    words[start + 4 + place % RING] = lease | _TAKEN
                    return lease >> 2
        return None

    def _append(self, worker: int, lease: int) -> None:
        words, start = self._words, self._start(worker)
        place = words[start + _END]
        if place - words[start + _FIRST] >= RING:
            assert words[start + _FIRST] < words[start + _BEGUN], "more batches drawn ahead than the ring has room for"
            self.commit(worker, words[start + _FIRST] + 1)
        words[start + 4 + place % RING] = lease
        words[start + _END] = place + 1

    def _leases(self, worker: int, first: int, end: int) -> Iterator[int]:
        """Those of a range of the worker's ring that are still its own."""
        words, start = self._words, self._start(worker)
        for place in range(first, end):
            lease = words[start + 4 + place % RING]
            if not lease & _TAKEN:
                yield lease

    def _start(self, worker: int) -> int:
        return _HEADER + self._workers * RING + worker * _WORKER
