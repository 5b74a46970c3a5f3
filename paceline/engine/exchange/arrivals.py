"""Meet through the log: a push is applied when it comes (bounded, async), or when enough are there (quorum).

gradient in the slot -> under the run's lock: does it count, and is it applied now? -> entry in the log
  -> applied to every part in its turn, by this worker or the servers, who copy the new parameters back
  -> bounded: wait while too far ahead, then copy again
"""

from __future__ import annotations

import time
from collections.abc import Callable

from paceline.config import Bounded, Pace, Quorum
from paceline.engine.exchange.applier import Applier
from paceline.engine.exchange.meeting import Push, Round
from paceline.protocol.crew import crew_size
from paceline.protocol.log import COPY, LOAD, SAVE, STEP, Entry
from paceline.protocol.rounds import NEVER, Waiting, is_out, quorum_met, within_bound
from paceline.transport.board import Board
from paceline.transport.lock import Lock
from paceline.transport.slots import ExchangeMemory, Spec

Close = Callable[[Entry], None]  # called under the lock with every STEP, as it is appended


class Arrivals:
    """A worker's side of the log of one exchange. ``applier`` is its hands; None where servers apply."""

    def __init__(
        self, spec: Spec, memory: ExchangeMemory, pace: Pace, board: Board, lock: Lock, rank: int, close: Close
    ) -> None:
        self._spec, self._memory, self._log = spec, memory, memory.log
        self._board, self._lock, self._rank, self._close = board, lock, rank, close
        self._quorum = pace.count if isinstance(pace, Quorum) else 0
        self._bound = pace.staleness if isinstance(pace, Bounded) else None
        self._slot = memory.slots[rank]
        self._version = 0  # of the copy that this worker computes on
        self.taken = 0  # the entry that has brought it
        self._unfinished: Entry | None = None
        self._last_fate = 0  # the last entry that this worker was a member of
        self.applier: Applier | None = None
        assert lock.journal is not None
        lock.journal.publish.append(self._publish)

    def _publish(self) -> None:
        """Under the lock, when all is done: what was appended may be applied."""
        if self._log.publish():
            self._board.ring(self._board.common)

    @property
    def number(self) -> int:
        """STEPs so far, of all workers."""
        return self._log.version

    def meet(self, push: Push) -> Round:
        """Offer what is in the slot; returns when the parameters may be computed on again.

        At quorum, min(k, workers with data) must come here for it to be applied; at bounded the slowest workers must
        come on. Raises Aborted if the run is stopped while waiting.
        """
        memory, rank, log = self._memory, self._rank, self._log
        self._slot.write(memory.pushed[rank] + 1, push.weight, push.loss, push.stop, push.steps, push.place)
        memory.pushed[rank] += 1
        begun = time.monotonic()
        with self._lock:
            if max(self._board.ended):
                return Round(log.version, (), 0.0, counted=False, over=True)
            staleness = log.version - self._version
            late = self._quorum > 0 and staleness > 0
            entry = None
            if self._quorum and not late:
                log.offer(rank)
                entry = self._close_round()
            elif not late:
                entry = self._append(STEP, (rank,), staleness)
            memory.clocks[rank] += 1
            # What the bound asks a reader to have seen is in its copy if the clocks were near enough already now.
            ahead = self._bound is not None and within_bound(rank, self._bound, memory.clocks, self._board) is not None
        if late:
            self.refresh()
            return Round(log.version, (), 0.0, staleness, counted=False)
        waited = 0.0
        if entry is None:
            entry = self._board.wait(self._await_quorum)
            waited = time.monotonic() - begun
            if entry is None:
                return Round(log.version, (), waited, counted=False, over=True)
        self._apply(entry)
        if ahead:
            waited += self.await_slower()
        elif self._bound is not None:
            self._board.ring(rank)  # who waits for this worker's clock
        return Round(entry.version, entry.members, waited, staleness)

    def push(self) -> None:
        """Have what is in the slot applied as one STEP, and go on; the slot is free again after ``finish``."""
        self._slot.write(self._memory.pushed[self._rank] + 1, 1.0, (0.0, 0.0), stop=False)
        self._memory.pushed[self._rank] += 1
        with self._lock:
            self._unfinished = self._append(STEP, (self._rank,))
        if self.applier is not None:
            self.finish()

    def finish(self) -> None:
        """Return when the last ``push`` is applied."""
        if self._unfinished is not None:
            self._apply(self._unfinished)
            self._unfinished = None

    def refresh(self) -> None:
        """Copy the newest parameters, with all that was appended before this."""
        with self._lock:
            entry = self._append(COPY, (self._rank,))
        self._apply(entry)

    def load(self, loads: int, write: Callable[[], None]) -> None:
        """This worker has loaded its ``loads``-th checkpoint; ``write`` puts it in place of what all share, in its
        turn, if no other worker has done so. The others get what it left."""
        loaded = self._memory.loads
        with self._lock:
            fresh = loads > loaded[0]
            entry = self._append(LOAD if fresh else COPY, (self._rank,))
        if fresh:
            for part in range(self._spec.parts):
                self._await_turn(part, entry.number)
            # Another's entry may be before this one. It counts if that worker has not died before it had written.
            if loads > loaded[0]:
                write()
                with self._lock:
                    loaded[0] = loads
            for part in range(self._spec.parts):
                self._memory.applied[part] = entry.number
            self._board.ring(self._rank)
            self.refresh()
        else:
            self._apply(entry)

    def append_save(self) -> Entry:
        """Under the run's lock: what was appended so far is in the checkpoint, and nothing else."""
        return self._append(SAVE, (self._rank,))

    def save(self, entry: Entry, copy: Callable[[], None]) -> None:
        """Call ``copy`` in the turn of ``entry``, a SAVE, at all parts."""
        for part in range(self._spec.parts):
            self._await_turn(part, entry.number)
        copy()
        for part in range(self._spec.parts):
            self._memory.applied[part] = entry.number
        self._board.ring(self._rank)

    def go_on_from(self, number: int) -> None:
        """Under the run's lock, before anybody has pushed: this was the version of the run that is resumed."""
        self._log.go_on_from(number)

    def bury(self, worker: int, deaths: int) -> None:
        """Under the run's lock: this worker has died so many times; what it has left in the log is for others to do."""
        if self._memory.attached[worker] < deaths:
            self._memory.since[worker] = NEVER
            self._log.withdraw(worker)

    def finish_abandoned(self) -> None:
        """What the dead have left in the log is done by whoever waits for its turn."""

    def attach_again(self, deaths: int) -> None:
        """Under the run's lock: this process is the worker's next, after so many that have died."""
        self._memory.since[self._rank] = self._log.appended + 1
        self._memory.attached[self._rank] = deaths

    def join(self) -> None:
        """Come to the newest parameters."""
        self.refresh()

    def level(self) -> None:
        """Under the lock: nobody waits for steps of the past."""
        clocks = self._memory.clocks
        furthest = max(clocks)
        for worker in range(len(clocks)):
            clocks[worker] = furthest

    def catch_up(self) -> None:
        """Come back from outside the minimum clock: at the clock of the slowest of the others."""
        clocks, board = self._memory.clocks, self._board
        with self._lock:
            others = [clocks[w] for w in range(len(clocks)) if w != self._rank and not is_out(w, board)]
            clocks[self._rank] = max(clocks[self._rank], min(others, default=0))
        board.ring(self._rank)

    def _append(self, kind: int, members: tuple[int, ...], staleness: int = 0) -> Entry:
        entry = self._log.append(kind, self._rank, members, staleness, self._board.crew if self._spec.servers else 0)
        if self._rank in members:
            self._last_fate = entry.number
        if kind == STEP:
            self._close(entry)
        return entry

    def _await_quorum(self) -> Entry | Waiting | None:
        """The entry that this worker's gradient is in; it appends it itself if it is the one to see a quorum."""
        board, log = self._board, self._log
        # The number is written last, so it is read first; it alone says whether the rest is of this offer.
        if self._last_fate < log.fate(self._rank).number <= log.seen:
            fate = log.fate(self._rank)
            self._last_fate = fate.number
            return Entry(fate.number, STEP, fate.by, fate.version, 0, tuple(range(fate.members)))
        if max(board.ended) or board.interrupt:
            return None
        answer = quorum_met(self._quorum, log.offered, board)
        if isinstance(answer, Waiting):
            return Waiting(board.common, answer.reason)
        with self._lock:
            if self._rank in log.offered and not max(board.ended):
                return self._close_round() or Waiting(board.common, "a worker has just come back")
        return Waiting(board.common, "the round has just been closed")

    def _close_round(self) -> Entry | None:
        """Under the lock: close the open round if a quorum is there."""
        log = self._log
        answer = quorum_met(self._quorum, log.offered, self._board)
        if isinstance(answer, Waiting):
            return None
        log.clear_offers()
        return self._append(STEP, answer.contributors)

    def _apply(self, entry: Entry) -> None:
        """See the entry applied to all parts, by this worker where it is its own and there are no servers."""
        for part in range(self._spec.parts):
            if self.applier is not None and entry.by == self._rank:
                self._await_turn(part, entry.number)
                self.applier.apply(part, entry)
                self._board.ring(self._rank)
            else:
                self._board.wait(lambda part=part: self._is_applied(part, entry))  # type: ignore[misc]
        self._version, self.taken = entry.version, entry.number

    def _await_turn(self, part: int, number: int) -> None:
        applied = self._memory.applied
        if applied[part] < number - 1:
            self._board.wait(lambda: applied[part] >= number - 1 or self._waiting_for(part))

    def _is_applied(self, part: int, entry: Entry) -> bool | Waiting:
        return self._memory.applied[part] >= entry.number or self._waiting_for(part)

    def _waiting_for(self, part: int) -> Waiting:
        entry = self._log.entry(self._memory.applied[part] + 1)
        if self._is_orphan(entry):
            self._adopt(part)
            return Waiting(self._rank, f"entry {entry.number} of worker {entry.by}, which died, is being applied")
        on = applied_by(self._spec, entry, part)
        return Waiting(on, f"member {on} has not applied entry {entry.number}")

    def _is_orphan(self, entry: Entry) -> bool:
        """Has the worker died that would apply it?"""
        by_worker = not entry.crew or entry.kind in (LOAD, SAVE)
        return by_worker and self._memory.since[entry.by] > entry.number

    def _adopt(self, part: int) -> None:
        """Apply to a part the entry of a worker that has died, from where it was left; one does it for all."""
        with self._lock:
            number = self._memory.applied[part] + 1
            if number > self._log.appended:
                return
            entry = self._log.entry(number)
            if not self._is_orphan(entry):
                return
            # What it has loaded is gone with it, and nobody has use for a part of a copy.
            if entry.kind in (LOAD, SAVE):
                self._memory.applied[part] = number
            else:
                assert self.applier is not None
                self.applier.apply(part, entry)
        self._board.ring(self._rank)

    def await_slower(self) -> float:
        """Pace bounded: wait while too far ahead, then take what has come in the meantime. Seconds waited."""
        memory, board, rank, bound = self._memory, self._board, self._rank, self._bound
        if bound is None:
            return 0.0
        board.ring(rank)  # who waits for this worker's clock
        begun = time.monotonic()
        board.wait(lambda: max(board.ended) or board.interrupt or within_bound(rank, bound, memory.clocks, board) or 1)
        waited = time.monotonic() - begun
        self.refresh()
        return waited


def applied_by(spec: Spec, entry: Entry, part: int) -> int:
    """The member that applies ``entry`` to ``part``: a server where there are any, but a load or a save is the worker's
    own."""
    if not entry.crew or entry.kind in (LOAD, SAVE):
        return entry.by
    return spec.workers + part % crew_size(entry.crew)
