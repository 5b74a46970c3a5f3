"""The board: what each process of a host has published of itself, in one small shared segment.

Every cell has one writer and is an aligned 8-byte word, so a store is never seen half done. Behind the
columns of ``protocol/rounds.py`` it holds, for every member, a count of its changes: the word others sleep
on. Members are the workers by rank, then the servers. The launcher writes ``abort``, ``interrupt``, ``deaths``,
``given_up``, ``leaving``, ``width``, the crew and what is wanted. Columns with many writers are written under the run's
lock, through its journal.

There is a place for every worker and server that there may ever be. A worker's place that nobody has had is LEFT, and
lies at or behind ``width``, so that nobody looks at it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from paceline.protocol.crew import crew_size
from paceline.protocol.rounds import LEFT, NEVER, NOT_PARKED, Waiting
from paceline.transport import futex, segment
from paceline.transport.accounts import WORDS as ACCOUNTS_WORDS
from paceline.transport.accounts import Accounts
from paceline.transport.journal import WORDS as JOURNAL_WORDS
from paceline.transport.journal import Journal, Watched
from paceline.transport.shares import PASSES, Shares, words_of_shares

MAGIC = 0x31304C4341504C43
MAX_LOADERS = 1024  # some scripts make and wrap a loader for every epoch
COLLECTIVES = MAX_LOADERS - 1  # stands for a loader: its passes are what all workers have called together, as run.wrap
AWAITS_OTHERS, AWAITS_ITS_WORKER = 1, 2  # what a process waits for, as told in its word of ``asleep``; 0: nothing
_LINE = 8  # words in a cache line: members' change counts do not share one
_SPINS = 40
_WAIT_S = 0.5  # a sleeper looks for an abort at least this often, whoever forgot to wake it

T = TypeVar("T")


class Aborted(BaseException):
    """The launcher has told everyone to stop; not an Exception, so that user code does not swallow it."""


class Board:
    """A view of the segment ``memory``; the first to make one passes its shape in ``create``."""

    def __init__(self, memory: segment.Memory) -> None:
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._address = segment.address(memory)
        assert self._words[0] == MAGIC, "not a board"
        workers, servers = self._words[1], self._words[2]
        self.workers, self.servers, self.members = workers, servers, workers + servers
        offsets = _offsets(workers, servers)
        self._events = offsets["events"]
        self.common = self.members  # the place after the members': a change that concerns everybody
        self.journal = Journal(self._words[offsets["journal"] : offsets["journal"] + JOURNAL_WORDS])
        self.journal.map(0, self._words)

        def watched(name: str, words: int) -> Watched:
            return self.journal.watch(0, offsets[name], offsets[name] + words)

        self.gone = self._words[offsets["gone"] : offsets["gone"] + workers]
        self.presence = watched("gone", workers)  # the same words, to be changed under the lock
        self.settled = watched("settled", workers)  # of how many deaths of a worker the consequences are drawn
        self.places = watched("places", workers * 2)  # see Worker._settle_place
        self.deaths = self._words[offsets["deaths"] : offsets["deaths"] + workers]
        self.given_up = self._words[offsets["given_up"] : offsets["given_up"] + workers]
        self.leaving = self._words[offsets["leaving"] : offsets["leaving"] + workers]  # who is asked to leave
        self.coming = watched("coming", workers)  # who has come to a place that was LEFT, and has not joined yet
        self._coming = offsets["coming"]
        # What newcomers ask of the others, each in its own place, and what they have been told: protocol/newcomers.py.
        self.asks = self._words[offsets["asks"] : offsets["asks"] + workers]
        self.answers = watched("answers", workers)
        # Called by who waits, after an alarm, with what it asks.
        self.on_alarm: Callable[[Callable[[], object]], None] = lambda ask: None
        self._heard = 0
        start = offsets["asleep"]
        self.asleep = self._words[start : start + self.members]  # who waits, and for what; for the launcher to look at
        self._asleep = start + self.members  # whose process this is; before it is known, nobody
        # For the launcher too: the number of the batch that a worker computes on (0: none, or it has not stepped yet),
        # and how long it has computed at most on the way to a step.
        self.in_hand = self._words[offsets["in_hand"] : offsets["in_hand"] + workers]
        self.longest_ns = self._words[offsets["longest_ns"] : offsets["longest_ns"] + workers]
        # Which of a worker's last gradients were not finite; see protocol/strikes.py.
        self.strikes = self._words[offsets["strikes"] : offsets["strikes"] + workers]
        self.parked = self._words[offsets["parked"] : offsets["parked"] + workers]
        self.ended = self._words[offsets["ended"] : offsets["ended"] + workers]
        self._passes: dict[int, memoryview[int]] = {}  # of the loaders that have been asked about
        self._passes_at = offsets["passes"]
        self._floats = memoryview(memory).cast("d")
        self._looks = offsets["looks"]
        self.accounts = Accounts(
            watched("accounts", ACCOUNTS_WORDS)
        )  # what stop rules go by, where one decides for all
        # The columns with many writers. In "evaluated" (read without a step) and "trained" (a push made from it counts)
        # whoever writes, writes 1; the others are written under the run's lock: the last pass over a loader of which
        # the consequences are drawn, what protocol/rounds.py has of leases, and what protocol/deals.py has of deals.
        self.evaluated = self._words[offsets["evaluated"] : offsets["evaluated"] + MAX_LOADERS]
        self.trained = self._words[offsets["trained"] : offsets["trained"] + MAX_LOADERS]
        self.decided = watched("decided", MAX_LOADERS)
        self.returned, self.drained = watched("returned", MAX_LOADERS), watched("drained", MAX_LOADERS)
        dealt = MAX_LOADERS * PASSES
        self.deals, self.lost = watched("deals", dealt), watched("lost", dealt)
        shares, outs = watched("shares", dealt * words_of_shares(workers)), watched("outs", dealt * workers)
        self.shares = Shares(self.deals, self.lost, shares, outs, workers)
        self._cores = len(os.sched_getaffinity(0))

    @staticmethod
    def create(workers: int, servers: int, *, places: tuple[int, int] | None = None) -> int:
        """A descriptor of a fresh board for so many processes, with ``places`` for so many. Raises HostError."""
        most, most_servers = places or (workers, servers)
        offsets = _offsets(most, most_servers)
        fd = segment.create("the board", offsets["end"] * 8)
        with segment.attach(fd) as memory:
            words = memoryview(memory).cast("Q")
            for worker in range(workers, most):
                words[offsets["gone"] + worker] = LEFT
            words[13], words[10], words[12], words[14] = workers, workers, servers, servers
            words[1], words[2], words[0] = most, most_servers, MAGIC
            words.release()
        return fd

    @property
    def abort(self) -> bool:
        return self._words[3] != 0

    @property
    def interrupt(self) -> bool:
        """Has the user asked for an end (Ctrl-C)? Workers agree on the round in which to obey."""
        return self._words[4] != 0

    @property
    def published(self) -> int:
        """How many collectives' memory has been filled."""
        return self._words[5]

    @property
    def checkpoint(self) -> int:
        """The last checkpoint that was begun: the round, or version, of the first exchange."""
        return self._words[7]

    def want_checkpoint(self, number: int) -> None:
        """Under the run's lock: let all know of it, also those who wait."""
        self._words[7] = number
        self.alarm()

    def alarm(self) -> None:
        """Under the run's lock: let all look at the board, also those who wait."""
        self._words[9] += 1
        self.wake_all()

    @property
    def alarms(self) -> int:
        """How often there was an alarm: the launcher's, who takes no lock, and the others'."""
        return self._words[6] + self._words[9]

    @property
    def owes(self) -> bool:
        """Are consequences of a death still to be drawn, once the round that it was in is over?"""
        return self._words[8] != 0

    @owes.setter
    def owes(self, value: bool) -> None:
        self._words[8] = value

    @property
    def width(self) -> int:
        """Of the workers' places only the first ``width`` have ever had a worker; it only rises."""
        return self._words[13]

    @property
    def wanted(self) -> int:
        """How many workers the run is to have now."""
        return self._words[10]

    @property
    def crew(self) -> int:
        """By which servers a push is stepped that is made now (protocol/crew.py)."""
        return self._words[12]

    @property
    def kept_servers(self) -> int:
        """A server with this rank, or a higher one, is to leave."""
        return self._words[14]

    def set_servers(self, crew: int, kept: int) -> None:
        """The launcher: which crew there is from now on, and how many servers stay."""
        self._words[12], self._words[14] = crew, kept
        self.wake_all()

    @property
    def joins(self) -> int:
        """How often a worker has come to a place that was LEFT."""
        return self._words[11]

    def count_join(self) -> None:
        """Under the run's lock."""
        self._words[11] += 1

    def belongs_to(self, member: int) -> None:
        """From now on it is told when this process of the member's waits."""
        self._asleep += member - self.members
        self._words[self._asleep] = 0
        if member < self.workers:
            self.in_hand[member] = self.strikes[member] = 0

    @contextmanager
    def waiting(self, what: int = AWAITS_OTHERS) -> Iterator[None]:
        """This process waits by other means than ``wait``."""
        self._words[self._asleep] = what
        try:
            yield
        finally:
            self._words[self._asleep] = 0

    def is_awaited(self, member: int) -> bool:
        """Do others wait, and this one not for them?"""
        return self.asleep[member] != AWAITS_OTHERS and any(word == AWAITS_OTHERS for word in self.asleep[: self.width])

    def publish(self, number: int) -> None:
        """Under the run's lock: the memory of this collective is filled."""
        self._words[5] = number
        self.ring(self.common)

    def passes(self, loader: int) -> memoryview[int]:
        if loader not in self._passes:
            start = self._passes_at + range(MAX_LOADERS)[loader] * self.workers
            self._passes[loader] = self._words[start : start + self.workers]
        return self._passes[loader]

    def look(self, loader: int, number: int, worker: int) -> memoryview[float]:
        """[sum of loss times samples, sum of samples, steps] of a worker's pass ``number``; two fit."""
        start = self._looks + ((loader * 2 + number % 2) * self.workers + worker) * 3
        return self._floats[start : start + 3]

    def ring(self, member: int) -> None:
        """Count a change of ``member``, published before this, and wake those who sleep on it.

        A member rings for itself only; for ``common`` whoever holds the run's lock does.
        """
        index = self._events + member * _LINE
        self._words[index] += 1
        futex.wake(self._address + index * 8)

    def set_abort(self) -> None:
        self._words[3] = 1
        self.wake_all()

    def tell_death(self, worker: int, *, for_good: bool, deaths: int | None = None) -> None:
        """The launcher: a worker's process has ended before its time. ``for_good``: no other takes its place.

        ``deaths``: how many there have been with this one; a launcher that takes over may tell of it again.
        """
        self.deaths[worker] = self.deaths[worker] + 1 if deaths is None else deaths
        if for_good:
            # Others are given their memory without it: who still waits for that is free to go, and not excused. Nor is
            # the dead one, which nobody has buried yet.
            if self.parked[worker] == COLLECTIVES + 1:
                self.parked[worker] = NOT_PARKED
            self.passes(COLLECTIVES)[worker] = NEVER
        self.given_up[worker] = self.given_up[worker] or for_good
        self._words[6] += 1
        self.ring(worker)  # the dead do not
        self.wake_all()

    def open_place(self, worker: int, collectives: int, *, deaths: int | None = None) -> None:
        """The launcher: a worker is about to come to a place that nobody has. So many collectives' memory is given out.

        To the others it is as if one had just died there, the place's ``deaths``-th; it joins as any newcomer does
        (docs/decisions/0012).
        """
        self.passes(COLLECTIVES)[worker] = collectives
        self._words[self._coming + worker] = 1
        self.leaving[worker] = 0
        self.given_up[worker] = 0
        self.deaths[worker] = self.deaths[worker] + 1 if deaths is None else deaths
        self._words[13] = max(self._words[13], worker + 1)
        self._words[6] += 1
        self.wake_all()

    def ask_to_leave(self, worker: int) -> None:
        """The launcher: this worker is to leave when it can."""
        self.leaving[worker] = 1

    def want(self, workers: int) -> None:
        """The launcher: how many workers the run is to have."""
        self._words[10] = workers

    def set_interrupt(self) -> None:
        self._words[4] = 1

    def wake_all(self) -> None:
        for member in range(self.members + 1):
            futex.wake(self._address + (self._events + member * _LINE) * 8)

    def wait(self, ask: Callable[[], T | Waiting]) -> T:
        """Ask until the answer is not Waiting; sleep in between on the member it names.

        Raises Aborted when the run is being stopped.
        """
        answer = ask()
        # Sleeping costs a wake-up of 10 to 50 microseconds; looking again for a while costs a core. It pays only where
        # every process has a core of its own.
        spins = _SPINS if self._words[10] + crew_size(self._words[12]) <= self._cores else 0
        while isinstance(answer, Waiting):
            if self._words[3]:
                raise Aborted(answer.reason)
            if self.alarms != self._heard:
                self._heard = self.alarms
                self.on_alarm(ask)
                answer = ask()
                continue
            if spins:
                spins -= 1
                answer = ask()
                continue
            index = self._events + answer.on * _LINE
            seen = self._words[index]
            again = ask()
            if isinstance(again, Waiting) and again.on == answer.on:
                self._words[self._asleep] = AWAITS_OTHERS
                futex.wait(self._address + index * 8, seen & 0xFFFFFFFF, _WAIT_S)
                self._words[self._asleep] = 0
                again = ask()
            answer = again
        return answer


def _offsets(workers: int, servers: int) -> dict[str, int]:
    """Where each column begins, in words."""
    place, offsets = 2 * _LINE, {}
    columns = {
        "events": (workers + servers + 1) * _LINE,
        "gone": workers,
        "parked": workers,
        "ended": workers,
        "passes": workers * MAX_LOADERS,
        "looks": workers * 6 * MAX_LOADERS,
        "evaluated": MAX_LOADERS,
        "trained": MAX_LOADERS,
        "decided": MAX_LOADERS,
        "returned": MAX_LOADERS,
        "drained": MAX_LOADERS,
        "accounts": ACCOUNTS_WORDS,
        "deaths": workers,
        "given_up": workers,
        "leaving": workers,
        "coming": workers,
        "settled": workers,
        "places": workers * 2,
        "deals": MAX_LOADERS * PASSES,
        "lost": MAX_LOADERS * PASSES,
        "shares": MAX_LOADERS * PASSES * words_of_shares(workers),
        "outs": MAX_LOADERS * PASSES * workers,
        "asleep": workers + servers + 1,
        "in_hand": workers,
        "longest_ns": workers,
        "strikes": workers,
        "asks": workers,
        "answers": workers,
        "journal": JOURNAL_WORDS,
    }
    for name, words in columns.items():
        offsets[name] = place
        place += -(-words // _LINE) * _LINE
    return offsets | {"end": place}
