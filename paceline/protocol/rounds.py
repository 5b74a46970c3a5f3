"""When does a round close, and when may a worker leave the end of an epoch: pure functions of the board.

The laws
  1. Round r closes when every worker that is neither parked nor gone has pushed r. Its *contributors* are
     the workers that have pushed r.
  2. A worker *parks* at the end of a pass over a loader and stays parked until every worker that is not
     gone has finished that pass. A parked worker cannot push, so rounds need not wait for it.
  3. Nobody pushes r+1 before every stepper of r has stepped r.

Why all who ask get the same contributors, each at its own moment: a worker is excused from r only while
somebody still in the data holds its barrier shut, and that somebody is waiting for round r itself. So an
excused worker cannot come to push r before r is over, and "pushed" and "gone" never go back.

Columns are read in the order pushed, gone, parked, passes. A column is anything indexable by rank: memory
shared by processes, or a list in a test or a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Column: TypeAlias = "Sequence[int] | memoryview[int]"

NOT_PARKED = 0


class Board(Protocol):
    """What the workers of a job have published of themselves; each column has one writer a cell.

    ``parked[w]`` is 0, or 1 + the loader at whose end worker w waits; ``passes(l)[w]`` is how many passes over
    loader l worker w has finished; ``gone[w]`` is 1 once w has left.
    """

    @property
    def gone(self) -> Column: ...

    @property
    def parked(self) -> Column: ...

    def passes(self, loader: int) -> Column: ...


@dataclass(frozen=True, slots=True)
class Closed:
    """The round is closed; ``contributors`` pushed it, lowest rank first."""

    contributors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not yet, because of worker ``on``; ``reason`` finishes the sentence "I wait because"."""

    on: int
    reason: str


def close_round(number: int, pushed: Column, board: Board) -> Closed | Waiting:
    """Is round ``number`` closed, and with whom? ``pushed[w]`` is the last round worker w has pushed.

    Must be asked by somebody who holds the round open: a contributor, or a server that has seen one.
    """
    contributors = []
    missing = []
    for worker in range(len(pushed)):
        if pushed[worker] >= number:
            contributors.append(worker)
        else:
            missing.append(worker)
    for worker in missing:
        if not board.gone[worker] and not _excused(worker, board):
            return Waiting(worker, f"worker {worker} has not pushed round {number}")
    return Closed(tuple(contributors))


def _excused(worker: int, board: Board) -> bool:
    """Is the worker parked behind a barrier that is still shut? If it is open, the worker is only slow to leave."""
    parked = board.parked[worker]
    if parked == NOT_PARKED:
        return False
    number = board.passes(parked - 1)[worker]
    # Looked at twice: if it has gone on in between, that number may be of a pass it left without parking.
    return board.parked[worker] == parked and not barrier_open(parked - 1, number, board)


def quorum_met(count: int, offered: Sequence[int], board: Board) -> Closed | Waiting:
    """Pace quorum: may the round be closed with the workers that have ``offered`` a gradient for it?

    Yes with ``count`` of them, or as many as have data left. Who asks must hold the run's lock to act upon a yes.
    """
    if len(offered) >= count:
        return Closed(tuple(offered))
    for worker in range(len(board.gone)):
        if worker not in offered and not board.gone[worker] and not _excused(worker, board):
            return Waiting(worker, f"{len(offered)} of {count} pushes are there, worker {worker}'s is not")
    return Closed(tuple(offered))


def within_bound(worker: int, staleness: int, clocks: Column, board: Board) -> Waiting | None:
    """Pace bounded: may ``worker`` begin its next step? Its clock is at most ``staleness`` ahead of the slowest.

    A clock counts the steps a worker has finished (Ho et al. 2013). Who is out of data or gone holds nobody back.
    """
    for other in range(len(clocks)):
        if clocks[worker] - clocks[other] > staleness and not board.gone[other] and not _excused(other, board):
            return Waiting(other, f"worker {other} is {clocks[worker] - clocks[other]} steps behind")
    return None


def waits_elsewhere(worker: int, loader: int, board: Board) -> bool:
    """Does the worker wait for others, and not for the end of a pass over ``loader``?"""
    return board.parked[worker] != loader + 1 and _excused(worker, board)


def is_out(worker: int, board: Board) -> bool:
    """Is the worker gone, or out of data for now?"""
    return board.gone[worker] != 0 or _excused(worker, board)


def next_to_act(board: Board) -> int | None:
    """A worker without whose next word no round can begin; None when all are gone. For servers with nothing to do."""
    present = [worker for worker in range(len(board.gone)) if not board.gone[worker]]
    for worker in present:
        if not _excused(worker, board):
            return worker
    return present[0] if present else None


def reached(number: int, column: Column, members: Sequence[int]) -> Closed | Waiting:
    """Have all ``members`` (workers, then servers) come to round ``number`` in this column of theirs?"""
    for member in members:
        if column[member] < number:
            return Waiting(member, f"member {member} is not done with round {number}")
    return Closed(tuple(members))


def barrier_open(loader: int, number: int, board: Board) -> bool:
    """Have all workers that are not gone finished ``number`` passes over ``loader``?"""
    return holding(loader, number, board) is None


def holding(loader: int, number: int, board: Board) -> Waiting | None:
    """The first worker that keeps the end of pass ``number`` shut, or None when it is open."""
    passes = board.passes(loader)
    for worker in range(len(passes)):
        # gone is read last: a worker that finishes its pass and leaves between the two reads counts as done.
        if passes[worker] < number and not board.gone[worker]:
            return Waiting(worker, f"worker {worker} has not finished its part of the data")
    return None
