"""The push of a host: what its workers bring to a round is one, or each brings its own.

Workers of a host that is not home's fold their gradients before the wire. A fold cannot be taken apart, so it counts
with all of them or not at all:

1. Each *offers* its gradient for a round, once all of it is where the others of its host see it.
2. When all have offered, the first of them (the lead) has the fold sent. Then, under the run's lock, it says of each
   that its gradient lies in the fold, and pushes: that one store is the push of all. Each then says so for itself, and
   for one that has died whoever buries it.
3. If one of them does not come to the round, because it is parked, gone or has died, or brings nothing that could be
   folded, each sends its own gradient and pushes it. Who finds that out takes its offer back under the same lock, so it
   is either in the fold, or the fold is not pushed.
4. A host of whose workers one has died, or left, is not one any more.

A norm of the round is asked for in the same way, before: then the fold is there for its norm, and asking is what that
one store does. What is offered is numbered in the order in which workers come to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.protocol.rounds import NORMS, Board, Column, Waiting, is_out


class Slot(Protocol):
    def lies_in(self, number: int) -> int | None:
        """Whose slot has what this worker brings to round ``number``; None: its own, which has nothing else."""


_WORKERS = 2**16  # more than there are
LEAVES = 2**62  # in ``offered``: it takes part in no fold any more


def offer(number: int, norm: int | None = None) -> int:
    """What a worker writes who offers its gradient for round ``number``, or for a ``norm`` of it, by its number."""
    return alone(number, norm) + 1


def alone(number: int, norm: int | None = None) -> int:
    """What it writes who brings its own to that."""
    return 2 * (norm or (number + 1) * NORMS)


def comes_to(number: int, member: int, offered: Column) -> bool:
    """Has this worker come to its push of round ``number``?"""
    return offered[member] in (offer(number), alone(number))


def are_together(
    number: int, members: Sequence[int], offered: Column, deaths: Column, board: Board, norm: int | None = None
) -> bool | Waiting:
    """Is what these workers of one host bring to round ``number``, or to this norm of it, one push?"""
    missing = [member for member in members if offered[member] != offer(number, norm)]
    for member in missing:
        if offered[member] in (alone(number, norm), LEAVES) or is_out(member, board):
            return False
    if any(deaths[member] for member in members):
        return False
    if missing:
        return Waiting(missing[0], f"worker {missing[0]} has not offered its gradient for round {number}")
    return True


def is_one(members: Sequence[int], offered: Column, deaths: Column) -> bool:
    """Can these workers still push as one?"""
    return not any(deaths[member] or offered[member] == LEAVES for member in members)


def is_pushed(worker: int, number: int, pushed: Column, slots: Sequence[Slot], least: int | None = None) -> bool:
    """Has the push of its host been made, with this worker's gradient of round ``number`` in it? ``pushed`` may be
    another column, which is then at ``least`` this."""
    lead = slots[worker].lies_in(number)
    return lead is not None and slots[lead].lies_in(number) == lead and pushed[lead] >= (least or number)


def pushed_for(worker: int, offered: Column, pushed: Column, slots: Sequence[Slot]) -> int:
    """The last round that this worker, which has died, has pushed, or its host for it."""
    number = offered[worker] // (2 * NORMS) - 1
    return number if offered[worker] == offer(number) and is_pushed(worker, number, pushed, slots) else pushed[worker]


def asked_for(worker: int, offered: Column, asked: Column, slots: Sequence[Slot]) -> int:
    """The last norm that this worker, which has died, has asked for, or its host for it."""
    norm = offered[worker] // 2
    number = norm // NORMS
    is_offer = norm % NORMS != 0 and offered[worker] == offer(number, norm)
    return norm if is_offer and is_pushed(worker, number, asked, slots, norm) else asked[worker]


class Columns(Protocol):
    """What the workers have published of themselves in an exchange, as ``rounds.py`` has it."""

    @property
    def pushed(self) -> Column: ...

    @property
    def asked(self) -> Column: ...

    @property
    def answered(self) -> Column: ...

    @property
    def since(self) -> Column: ...

    @property
    def offered(self) -> Column: ...


def awaits(worker: int, me: int, number: int, columns: Columns) -> bool:
    """Does a worker stand in round ``number``, which is the next of an exchange, or at a norm of it, until ``me`` comes
    there? For one that counts in the round and has not come to it."""
    if columns.since[worker] > number:
        return False
    if columns.pushed[worker] >= number or comes_to(number, worker, columns.offered):
        return True
    norm = _norm_of(worker, number, columns)
    return norm > max(columns.answered[worker], _norm_of(me, number, columns))


def _norm_of(worker: int, number: int, columns: Columns) -> int:
    """The last norm of round ``number`` that a worker has come to; 0 if it has come to none."""
    norm = max(columns.asked[worker], 0 if columns.offered[worker] == LEAVES else columns.offered[worker] // 2)
    return norm if norm // NORMS == number and norm % NORMS else 0


def version(number: int, loads: int) -> int:
    """Of home's values after round ``number``, ``loads`` checkpoints having been loaded: rises with each. 0 is none."""
    return number + loads + 1


# Values of home's come to a host's mirror over the link of one of its workers: of any, for only some may be in a round.
# What two links bring comes in any order, so nothing is sent over one before what was sent over another is there. One
# word, in ``brought``, says which version was sent last and, until it is there, over whose link.


def sent(version: int, worker: int) -> int:
    """That this version is on its way, over this worker's link."""
    return version * _WORKERS + worker + 1


def arrived(version: int) -> int:
    """That it is there."""
    return version * _WORKERS


def has_version(word: int, version: int) -> bool:
    """Was this version, or a newer one, sent?"""
    return word >= arrived(version)


def is_there(word: int) -> bool | Waiting:
    """Is all that was sent there?"""
    over = word % _WORKERS - 1
    if over < 0:
        return True
    return Waiting(over, f"what worker {over} is sent for its host has not arrived")
