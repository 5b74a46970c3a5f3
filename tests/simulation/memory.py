"""Shared memory of which every read and write is a turn, and paceline's own views of it: board, exchange, leases.

What the classes here replace is only how memory is got and laid out. What is done with it is paceline's code:
``Board``, ``Journal``, ``Log``, ``Slot``, ``Undo``, ``Ledger`` and ``Leases`` are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence
from types import TracebackType
from typing import Any

from paceline.data import ledger
from paceline.data.ledger import _BEGUN, _END, _EPOCH, Ledger
from paceline.data.ledger import words_needed as ledger_words
from paceline.engine.worker.leases import Leases
from paceline.params.undo import HEADER_WORDS, Undo
from paceline.protocol import log
from paceline.protocol.rounds import LEFT
from paceline.transport.accounts import Accounts
from paceline.transport.board import COLLECTIVES, Board, _offsets
from paceline.transport.journal import WORDS as JOURNAL_WORDS
from paceline.transport.journal import Journal, Watched
from paceline.transport.shares import PASSES, Shares, words_of_shares
from paceline.transport.slots import Slot
from tests.simulation.scheduler import Scheduler, Task

_MOST = 64
_ALARMS = (6, 9)  # the board's words that count alarms
LOADERS = 2  # more columns of the board's are never looked at, and read as zeros


class Segment:
    """Words, zeros at first; ``columns`` are their names and lengths, in order. ``alone``: read and written by the
    lock's holder only."""

    def __init__(self, scheduler: Scheduler, columns: dict[str, int], *, alone: bool = False) -> None:
        self.scheduler, self.alone = scheduler, alone
        self.stored: dict[int, Any] = {}
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for name, length in columns.items():
            self._places[name] = start, start + length
            start += length
        self.words = Cells(self, 0, start)

    def place(self, name: str) -> tuple[int, int]:
        return self._places[name]

    def column(self, name: str) -> Cells:
        return self.words[slice(*self._places[name])]

    def raw(self, name: str) -> list[Any]:
        """The column's first values, for claims: no turn."""
        start, stop = self._places[name]
        return [self.stored.get(place, 0) for place in range(start, min(stop, start + _MOST))]

    def label(self, place: int) -> str:
        for name, (start, stop) in self._places.items():
            if start <= place < stop:
                return f"{name}[{place - start}]"
        return str(place)


class Cells(MutableSequence[Any]):
    """A range of a segment; ``alone`` as the segment's, or for these cells only."""

    def __init__(self, segment: Segment, start: int, stop: int, *, alone: bool = False) -> None:
        self._segment, self._start, self._length = segment, start, stop - start
        self._stored, self._scheduler = segment.stored, segment.scheduler
        self._alone = alone or segment.alone
        self.on_write: Callable[[int, Any, Any], None] | None = None  # place, value before, value now

    def private(self) -> Cells:
        return Cells(self._segment, self._start, self._start + self._length, alone=True)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._length):
            yield self[index]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._length)
            return Cells(self._segment, self._start + start, self._start + max(start, stop), alone=self._alone)
        if not 0 <= index < self._length:
            raise IndexError(index)
        self._scheduler.turn(alone=self._alone)
        value = self._stored.get(self._start + index, 0)
        if self._scheduler.trace is not None and not self._alone:
            self._tell("reads", index, value)
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        if not 0 <= index < self._length:
            raise IndexError(index)
        self._scheduler.turn(alone=self._alone)
        if self.on_write is not None:
            self.on_write(index, self._stored.get(self._start + index, 0), value)
        self._stored[self._start + index] = value
        if self._scheduler.trace is not None and not self._alone:
            self._tell("writes", index, value)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("memory cannot shrink")

    def insert(self, index: int, value: Any) -> None:
        raise TypeError("memory cannot grow")

    def _tell(self, verb: str, index: int, value: object) -> None:
        scheduler = self._scheduler
        assert scheduler.trace is not None
        where = self._segment.label(self._start + index)
        scheduler.trace(f"{scheduler.turns:6} {scheduler.current!r:14} {verb:6} {where} {value}")


class Host:
    """The memory of one run, before any process has mapped it."""

    def __init__(
        self, scheduler: Scheduler, begin: int, workers: int, begin_servers: int, servers: int, parts: int
    ) -> None:
        """``begin`` workers, with places for ``workers``; servers likewise."""
        self.scheduler, self.workers, self.servers, self.parts = scheduler, workers, servers, parts
        offsets = _offsets(workers, servers)
        names = sorted((name for name in offsets if name != "end"), key=lambda name: offsets[name])
        stops = [*(offsets[name] for name in names[1:]), offsets["end"]]
        columns = {"header": offsets[names[0]]}
        columns |= {name: stop - offsets[name] for name, stop in zip(names, stops, strict=True)}
        self.board = Segment(scheduler, columns)
        self.over = False  # has the launcher told the servers so?
        self.resumed: Any = None  # the checkpoint that the run goes on from
        self.board.stored |= {13: begin, 10: begin, 12: begin_servers, 14: begin_servers}
        self.board.stored |= {offsets["gone"] + place: LEFT for place in range(begin, workers)}
        self.board_floats = Segment(scheduler, columns)
        members, seats = workers + servers, parts or servers or workers
        self.exchange = Segment(
            scheduler,
            {
                "pushed": workers,
                "stepped": members,
                "asked": workers,
                "answered": workers,
                "loads": 1,
                "since": workers,
                "attached": workers,
                "crew": 1,
                "applied": parts,
                "clocks": workers,
                "undo": seats * HEADER_WORDS,
                "log": log.words_needed(workers) if parts else 0,
            },
        )
        self.slots = [SimulatedSlot(Segment(scheduler, {f"slot {worker}": 30})) for worker in range(workers)]
        # Told of what is written there: the place in the column, the value before, the value now.
        self.boards: dict[Task, SimulatedBoard] = {}
        self.on_park: Callable[[int, int, int], None] | None = None
        self.on_drain: Callable[[int, int, int], None] | None = None
        self.on_leave: Callable[[int, int, int], None] | None = None
        # Told of what worker has drawn which batch to train on.
        self.on_draw: Callable[[int, tuple[int, int]], None] | None = None
        self.ledgers = [Segment(scheduler, {"ledger": ledger_words(workers)}, alone=True) for _ in range(LOADERS)]


class SimulatedBoard(Board):
    """A process's view of the board."""

    def __init__(self, host: Host) -> None:
        assert host.scheduler.current is not None
        host.boards[host.scheduler.current] = self
        words, offsets = host.board.words, _offsets(host.workers, host.servers)
        self._words, self._address = words, 0
        self.workers, self.servers, self.members = host.workers, host.servers, host.workers + host.servers
        self._events, self.common = offsets["events"], self.members
        self.journal = Journal(host.board.column("journal").private()[:JOURNAL_WORDS])
        self.journal.map(0, words)

        def column(name: str) -> Cells:
            start = offsets[name]
            return words[start : start + host.workers]

        def watched(name: str, length: int) -> Watched:
            return self.journal.watch(0, offsets[name], offsets[name] + length)

        self.gone, self.presence = column("gone"), watched("gone", host.workers)
        self.presence._memory.on_write = host.on_leave  # type: ignore[attr-defined]
        self.settled, self.places = watched("settled", host.workers), watched("places", 2 * host.workers)
        self.deaths, self.given_up = column("deaths"), column("given_up")
        self.asks, self.answers = column("asks"), watched("answers", host.workers)
        self.on_alarm = lambda ask: None
        self.leaving, self.coming, self._coming = column("leaving"), watched("coming", host.workers), offsets["coming"]
        dealt = LOADERS * PASSES
        self.deals, self.lost = watched("deals", dealt), watched("lost", dealt)
        shares, outs = watched("shares", dealt * words_of_shares(host.workers)), watched("outs", dealt * host.workers)
        self.shares = Shares(self.deals, self.lost, shares, outs, host.workers)
        self._heard = 0
        self._asleep = offsets["asleep"] + self.members
        # For the launcher's watch alone, which is not played; when they are written depends on a clock.
        self.in_hand, self.longest_ns = [0] * host.workers, [0] * host.workers
        self.parked, self.ended = column("parked"), column("ended")
        self.parked.on_write = host.on_park
        start = offsets["passes"]
        self._known = {
            loader: words[start + loader * host.workers : start + (loader + 1) * host.workers]
            for loader in (*range(LOADERS), COLLECTIVES)
        }
        self._unknown: Any = (0,) * host.workers
        self._floats, self._looks = host.board_floats.words, offsets["looks"]
        self.accounts = Accounts(watched("accounts", 8))
        self.evaluated = words[offsets["evaluated"] : offsets["evaluated"] + LOADERS]
        self.trained = words[offsets["trained"] : offsets["trained"] + LOADERS]
        self.decided = watched("decided", LOADERS)
        self.returned, self.drained = watched("returned", LOADERS), watched("drained", LOADERS)
        self.drained._memory.on_write = host.on_drain  # type: ignore[attr-defined]
        self._cores = 0

    def may_sleep_through(self, host: Host, task: Task) -> bool:
        """A sleeper looks again within half a second. Does it have to? For the simulation: no turn."""
        if sum(host.board.stored.get(place, 0) for place in _ALARMS) != self._heard:
            return True  # the launcher's call came between its last look and its sleep
        if host.over:
            return True  # the launcher's message to a server came then
        if task.name.startswith("server") and host.board.stored[14] <= int(task.name.split()[1]):
            return True  # so did the word that it is to leave
        deaths = host.board.raw("deaths")[: host.workers]
        for worker, died in enumerate(deaths):
            own = task.name == f"worker {worker}" and any(deaths)
            if task.asleep_on == (self._events + worker * 8) * 8 and (died or own):
                return True  # the dead wake nobody, nor do those who bury them, nor who has adopted what one would too
        return False

    def passes(self, loader: int) -> Any:
        assert loader >= 0, "who is not parked waits at no loader's end"
        return self._known.get(loader, self._unknown)


class Futexes:
    """What the kernel does for ``transport/board.py``: sleeping on words of the board."""

    def __init__(self, host: Host) -> None:
        self._scheduler, self._stored = host.scheduler, host.board.stored

    def wait(self, address: int, seen: int, timeout_s: float) -> None:
        self._scheduler.turn()
        if self._stored.get(address // 8, 0) & 0xFFFFFFFF == seen:
            self._scheduler.sleep(address)

    def wake(self, address: int) -> None:
        self._scheduler.turn()
        self._scheduler.wake(address)


class SimulatedLock:
    """The run's lock, as transport/lock.py uses the journal around what the kernel does."""

    def __init__(self, scheduler: Scheduler, journal: Journal) -> None:
        self._scheduler, self.journal = scheduler, journal

    def __enter__(self) -> None:
        self._scheduler.take_lock()
        while not self.journal.is_known:
            self._scheduler.give_lock()
            self._scheduler.sleep("mended")
            self._scheduler.take_lock()
        self.journal.roll_back()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.journal.roll_back()
        self.journal.commit()
        self._scheduler.give_lock()

    def try_to_mend(self) -> None:
        self._scheduler.take_lock()  # the launcher tries again and again
        self.journal.roll_back()
        self._scheduler.give_lock()
        self._scheduler.wake("mended")


class SimulatedSlot(Slot):
    """``gradient`` is the batches that it was computed on; None while it is being written."""

    def __init__(self, header: Segment) -> None:
        self._words = self._floats = header.words  # no word of it is read both as an integer and as a float
        self.mask, self.chosen = memoryview(bytearray(1)), memoryview(bytearray(1))
        self.rows = {}
        self.gradient: Any = ()
        self.copy: Any = {}  # part -> the version that it is of

    @property
    def settings_version(self) -> int:
        return 0

    def lies_in(self, number: int) -> None:
        """All is here."""


class SimulatedMemory:
    """A process's view of an exchange's segment, as transport/slots.py's ``ExchangeMemory``."""

    def __init__(self, host: Host) -> None:
        segment = self._segment = host.exchange
        self.pushed, self.stepped = segment.column("pushed"), segment.column("stepped")
        self.asked, self.answered = segment.column("asked"), segment.column("answered")
        self.loads: Any = segment.column("loads")
        self.since, self.attached = segment.column("since"), segment.column("attached")
        self.crew = segment.column("crew")
        self.applied, self.clocks = segment.column("applied"), segment.column("clocks")
        undo = segment.column("undo")
        self.undo = [
            Undo(undo[start : start + HEADER_WORDS], None)  # type: ignore[arg-type]  # nothing is torn, nothing saved
            for start in range(0, len(undo), HEADER_WORDS)
        ]
        self.log = log.Log(segment.column("log"), host.workers)
        self.slots = host.slots
        self.offered = [0] * host.workers  # nobody is on another host

    def keep_journal(self, journal: Journal, number: int) -> None:
        journal.map(number, self._segment.words)
        self.loads = journal.watch(number, *self._segment.place("loads"))
        kept = journal.watch(number, *self._segment.place("log"))
        self.log = log.Log(self.log.words, len(self.slots), kept)


class WatchedLedger(Ledger):
    """The real one, which tells who has drawn which batch."""

    on_draw: Callable[[int, tuple[int, int]], None] | None

    def _append(self, worker: int, lease: int) -> None:
        super()._append(worker, lease)
        if self.on_draw is not None:
            self.on_draw(worker, (self._words[_EPOCH] - 1, lease >> 2))


class SimulatedLeases(Leases):
    def __init__(
        self, host: Host, loader: int, journal: Journal, lock: Any, rank: int, tell: Callable[[int], None]
    ) -> None:
        segment, words = 100 + loader, host.ledgers[loader].words
        journal.map(segment, words)
        self._ledger = WatchedLedger(journal.watch(segment, 0, len(words)), host.workers)
        self._ledger.on_draw = host.on_draw if loader == 0 else None
        self._lock, self._rank, self._workers, self._tell = lock, rank, host.workers, tell
        self._begun, self._total, self._secured, self._is_exhausted = 0, None, None, False
        self._stored = host.ledgers[loader].stored

    def draw(self, total: int | None, at_least: int = 0) -> int | None:
        drawn = super().draw(total, at_least)
        if drawn is None and total is not None:
            waiting = [lease >> 2 for lease in self._unbegun() if not lease & 3]
            assert not waiting, f"worker {self._rank} has nothing to draw while others have not begun {waiting}"
        return drawn

    def _unbegun(self) -> Iterator[int]:
        """What others have drawn and not begun: no turn."""
        for other in set(range(self._workers)) - {self._rank}:
            start = self._ledger._start(other)
            for place in range(self._stored.get(start + _BEGUN, 0), self._stored.get(start + _END, 0)):
                yield self._stored.get(start + 4 + place % ledger.RING, 0)
