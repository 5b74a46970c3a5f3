"""When does a round close, and when may a worker leave the end of an epoch: pure functions of the board.

The laws
  1. Round r closes when every worker that is neither parked nor gone has pushed r. Its *contributors* are
     the workers that have pushed r.
  2. A worker *parks* at the end of a pass over a loader and stays parked until every worker that is not
     gone has finished that pass. A parked worker cannot push, so rounds need not wait for it.
  3. Nobody pushes r+1 before every stepper of r has stepped r.
  4. Who had nothing to read, from a loader nobody is known to train on, parks *empty*: that pass may have been an
     evaluation, which is each worker's own business. It may go on as well when another has read the loader without
     a step (an evaluation then), or as the first, when everybody stands at the end of some pass and cannot go on.
  5. Who finds no batch left to draw by lease parks at the *tail* of its pass, since others may give some back. It goes
     on with those, or to the end of the pass once that is drained: nothing has come back, and everybody is at the tail
     or has finished. This is decided under the run's lock. Who has drawn nothing at all, from a loader nobody is known
     to train on, is *empty* there too: it may go on by law 4 as well, to the end of the pass.
  6. A worker that dies is *away* once the consequences of its death are drawn, under the run's lock. A push that it had
     finished counts; what is left of its share of that round is stepped by the first contributor that is alive, or,
     where only the dead had pushed it and nobody alive can, by whoever finds that out, under the lock. The ends of
     passes wait for who is away, rounds do not. A newcomer takes its place, *since* a round that nobody had pushed when
     it came, and pushes when the one before is over.
  7. A worker that comes to a place that was LEFT catches up while it is LEFT, so that nobody waits for it. It joins
     under the run's lock, in the pass that the hindmost of the others is in, and counts in rounds as any newcomer does.
     So it shuts no end of a pass that was open at one moment; who finds one open looks whether anybody has joined
     meanwhile.

Why all who ask get the same contributors, each at its own time: r is seen closed only if at one moment everybody who
has not pushed it was gone, or parked and not free to go on. From that moment until r is over nobody can free them: to
open a barrier, to evaluate or to give back one must be neither parked nor waiting for r, and there is no such worker
left. Who has died before it has come to r, to push it or to ask for a norm in it, holds it open until the consequences
are drawn. Who dies in r gives nothing back before r is over: by somebody alive who is in it, or, where only the dead
have come to it, without a step if none has pushed it. So all who ask for a norm get the same, too. Whom one that is
LEFT frees is told before, while rounds still wait for that one: at a tail; at a barrier it is the same word. One that
was away for good becomes LEFT between rounds only, and holds them open while that is looked at. A newcomer that has
published since when it counts, and then sees that nobody has pushed that round, is seen by all who push it later; else
it tries a later one, and has not pushed before.

Where servers step, a round has a *crew*: as many of them, lowest first, as its lowest contributor has found on the
board when it pushed. A server that has closed a round reads there whether it is in the crew; it is only if nobody has
pushed the next by then, since that waits for it. The first server is in every crew, and tells how many they are when it
has stepped.

Columns are read in the order pushed, gone, parked, passes, and the rest. A column is anything indexable by rank: memory
shared by processes, or a list in a test or a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Column: TypeAlias = "Sequence[int] | memoryview[int]"

PRESENT, LEFT, AWAY = 0, 1, 2  # values of ``gone``
NEVER = 2**63 - 1
NORMS = 1 << 10  # of one round, at most; they are numbered from NORMS times its number + 1
NOT_PARKED = 0
# Added to where a worker parks; DEAL with the number of a deal above it.
EMPTY, TAIL, DEAL = 1 << 32, 1 << 33, 1 << 34


class Board(Protocol):
    """What the workers of a job have published of themselves; each column has one writer a cell.

    ``parked[w]`` is 0, or 1 + the loader at whose end worker w waits, with EMPTY added by law 4, TAIL by law 5 or DEAL
    by law 8;
    ``passes(l)[w]`` is how many passes over loader l worker w has finished; ``gone[w]`` is LEFT once w has left, AWAY
    when it has died and another is to take its place;
    ``evaluated[l]`` is 1 once anyone has read loader l without a step; ``returned[l]`` is how many batches of it have
    come back, ``drained[l]`` how many passes over it are drained; where ``place_of`` says ``deals`` has the number of a
    pass's newest deal, ``lost`` not 0 if somebody was given up within that (``deals.py``).
    """

    @property
    def gone(self) -> Column: ...

    @property
    def parked(self) -> Column: ...

    @property
    def evaluated(self) -> Column: ...

    @property
    def returned(self) -> Column: ...

    @property
    def drained(self) -> Column: ...

    @property
    def deals(self) -> Column: ...

    @property
    def lost(self) -> Column: ...

    @property
    def width(self) -> int:
        """Only the first so many places have ever had a worker."""

    @property
    def joins(self) -> int:
        """How often a worker has come to a place that was LEFT."""

    @property
    def common(self) -> int:
        """The place, behind the members', that stands for a change of anybody's."""

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


def close_round(
    number: int, pushed: Column, board: Board, since: Column, asked: Column, of_round: int | None = None
) -> Closed | Waiting:
    """Is round ``number`` closed, and with whom? ``pushed[w]`` is the last round worker w has pushed, ``since[w]`` the
    first it counts in, ``asked[w]`` the last norm it has asked for. ``of_round``: what is numbered is something else
    than rounds, in this round.

    Must be asked by somebody who holds the round open: a contributor, or a server that has seen one.
    """
    first = number if of_round is None else of_round
    while True:
        seen = list(pushed)
        contributors = tuple(worker for worker in range(board.width) if seen[worker] >= number)
        missing = [
            worker
            for worker in range(board.width)
            if seen[worker] < number and (since[worker] <= first or _is_dying(worker, first, board, since, asked))
        ]
        places = _places(missing, board)
        for worker in missing:
            if not is_out(worker, board):
                return Waiting(_told_by(worker, board), f"worker {worker} has not pushed round {number}")
        # Who was seen to be out, or dead, may have pushed before that; who was looked at first may have gone on.
        if (_places(missing, board), list(pushed)) == (places, seen):
            return Closed(contributors)


def _is_dying(worker: int, number: int, board: Board, since: Column, asked: Column) -> bool:
    """Has it died before it came to round ``number``, and the consequences are just being drawn? Until they are, it
    holds the round open: others may be freed by them. They are not, before a round is over that it had come to."""
    return since[worker] == NEVER and board.gone[worker] == PRESENT and asked[worker] // NORMS < number


def _excused(worker: int, board: Board) -> bool:
    """Is the worker parked behind a barrier that is still shut? If it is open, the worker is only slow to leave."""
    parked = board.parked[worker]
    if parked == NOT_PARKED:
        return False
    loader = parked_at(parked)
    number = board.passes(loader)[worker]
    if board.parked[worker] != parked:
        return False  # it has gone on in between: that number may be of a pass it left without parking
    if parked & (TAIL | DEAL):
        more = (
            board.returned[loader] if parked & TAIL else board.deals[place_of(loader, number)] > deal_parked_at(parked)
        )
        return board.drained[loader] <= number and not more and not _free_to_go(parked, board)
    return not barrier_open(loader, number, board) and not _free_to_go(parked, board)


def _told_by(worker: int, board: Board) -> int:
    """Whose word changes when this worker goes on. At a tail it may stay after all, when others are faster."""
    return board.common if board.parked[worker] & TAIL else worker


def parked_at(parked: int) -> int:
    """The loader at whose end a worker waits that is parked."""
    return (parked & EMPTY - 1) - 1


def deal_parked_at(parked: int) -> int:
    """The deal at whose tail a worker waits that is parked at one."""
    return parked >> 35


def place_of(loader: int, number: int) -> int:
    """Where the board tells how pass ``number`` (the first is 0) is dealt; there is room for two of each loader."""
    return 2 * loader + number % 2


def _free_to_go(parked: int, board: Board) -> bool:
    return parked & EMPTY != 0 and board.evaluated[parked_at(parked)] != 0


def held_at_end(worker: int, board: Board) -> Waiting | None:
    """Whom ``worker``, which is parked, still waits for; None if it may go on."""
    parked = board.parked[worker]
    loader = parked_at(parked)
    held = holding(loader, board.passes(loader)[worker], board)
    if held is None or not parked & EMPTY:
        return held
    if is_let_go(worker, parked, board):
        return None
    return Waiting(board.common, held.reason)  # whoever evaluates or parks may end this


def is_let_go(worker: int, parked: int, board: Board) -> bool:
    """Law 4: may ``worker``, which is parked there, go on though that is shut?"""
    return parked & EMPTY != 0 and (_free_to_go(parked, board) or _first_if_all_stand(board) == worker)


def more_at_tail(worker: int, board: Board) -> bool | Waiting:
    """Have batches come back for ``worker``, which is parked at the tail of a pass, or is the pass drained?"""
    parked = board.parked[worker]
    loader = parked_at(parked)
    if board.drained[loader] > board.passes(loader)[worker]:
        return False
    if board.returned[loader]:
        return True
    if is_let_go(worker, parked, board):
        return False
    return Waiting(board.common, "others may give back batches that they have drawn")


def is_drained(loader: int, number: int, arriving: int | None, board: Board, leaving: Sequence[int] = ()) -> bool:
    """Under the run's lock: is pass ``number`` drained? ``arriving`` is a worker that is about to park at its tail,
    ``leaving`` are about to be LEFT."""
    present = [worker for worker in range(board.width) if not board.gone[worker] and worker not in leaving]
    passes = board.passes(loader)
    at_tail = [w for w in present if w == arriving or board.parked[w] & ~EMPTY == loader + 1 + TAIL]
    return (
        bool(present)
        and not board.returned[loader]
        and all(passes[worker] + (worker in at_tail) >= number for worker in present)
    )


def _first_if_all_stand(board: Board) -> int | None:
    """If at one moment everybody who is not gone is parked behind a barrier that is shut: who goes on first.

    One alone, and the same for all who ask, since the others are excused from rounds until it has done something.
    """
    everybody = range(board.width)
    if any(board.gone[worker] == AWAY for worker in everybody):
        return None  # another is to come in its place, and does not stand
    places = _places(everybody, board)
    if not all(is_out(worker, board) for worker in everybody) or _places(everybody, board) != places:
        return None
    empty = [(passes, worker) for worker, (_, parked, passes) in enumerate(places) if parked & EMPTY]
    return min(empty)[1] if empty else None


def _places(workers: Sequence[int], board: Board) -> list[tuple[int, int, int]]:
    """Where workers wait. Passes are counted: who is at the same place as before has not been away."""
    found = []
    for worker in workers:
        gone = board.gone[worker]
        parked = NOT_PARKED if gone else board.parked[worker]
        passes = board.passes(parked_at(parked))[worker] if parked else 0
        found.append((gone, parked, passes))
    return found


def quorum_met(count: int, offered: Sequence[int], board: Board) -> Closed | Waiting:
    """Pace quorum: may the round be closed with the workers that have ``offered`` a gradient for it?

    Yes with ``count`` of them, or as many as have data left. Who asks must hold the run's lock to act upon a yes.
    """
    if len(offered) >= count:
        return Closed(tuple(offered))
    for worker in range(board.width):
        if worker not in offered and not is_out(worker, board):
            return Waiting(worker, f"{len(offered)} of {count} pushes are there, worker {worker}'s is not")
    return Closed(tuple(offered))


def within_bound(worker: int, staleness: int, clocks: Column, board: Board) -> Waiting | None:
    """Pace bounded: may ``worker`` begin its next step? Its clock is at most ``staleness`` ahead of the slowest.

    A clock counts the steps a worker has finished (Ho et al. 2013). Who is out of data or gone holds nobody back.
    """
    for other in range(board.width):
        if clocks[worker] - clocks[other] > staleness and not is_out(other, board):
            return Waiting(_told_by(other, board), f"worker {other} is {clocks[worker] - clocks[other]} steps behind")
    return None


def is_out(worker: int, board: Board) -> bool:
    """Is the worker gone, or out of data for now?"""
    return board.gone[worker] != 0 or _excused(worker, board)


def next_to_act(board: Board) -> int | None:
    """A worker without whose next word no round can begin, or ``common`` if they all stand; None when all are gone.
    For servers with nothing to do. Who joins meanwhile may be overlooked, and wakes those who sleep on ``common``."""
    present = [worker for worker in range(board.width) if board.gone[worker] != LEFT]
    for worker in present:
        if not _excused(worker, board):
            return _told_by(worker, board)
    return board.common if present else None


@dataclass(frozen=True, slots=True)
class Rescue:
    """Who asks must do what is left of the share of ``worker``, which has died."""

    worker: int


def all_stepped(
    number: int, stepped: Column, contributors: Sequence[int], since: Column, me: int, of_round: int | None = None
) -> Closed | Waiting | Rescue:
    """Has everyone's share of round ``number`` been stepped, and if not, is it on ``me`` to do one of the dead?
    ``me`` is a contributor, and alive."""
    dead = [worker for worker in contributors if since[worker] > (number if of_round is None else of_round)]
    rescuer = next(worker for worker in contributors if worker not in dead)
    for worker in contributors:
        if stepped[worker] >= number:
            continue
        if worker not in dead:
            return Waiting(worker, f"worker {worker} has not stepped its share of round {number}")
        if rescuer == me:
            return Rescue(worker)
        return Waiting(rescuer, f"the share of worker {worker}, which died, is not stepped")
    return Closed(tuple(contributors))


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A round that only the dead are in: ``contributors`` had pushed it, nobody alive can; it is to be stepped for
    them. There are none where they had only asked for a norm in it: then it stays empty."""

    contributors: tuple[int, ...]


def is_over(
    number: int, pushed: Column, stepped: Column, servers: Sequence[int], since: Column, asked: Column, board: Board
) -> bool | Abandoned | Waiting:
    """For who is not in round ``number``, the last that has begun: is it over, so that the parameters stand still?

    ``servers`` are the members that step it, where workers do not.
    """
    while True:
        seen = list(pushed)
        answer = _is_over(number, seen, stepped, servers, since, asked, board)
        if list(pushed) == seen:  # nobody has pushed while the rest was looked at
            return answer


def _is_over(
    number: int,
    pushed: Sequence[int],
    stepped: Column,
    servers: Sequence[int],
    since: Column,
    asked: Column,
    board: Board,
) -> bool | Abandoned | Waiting:
    if max(pushed) > number:
        return True
    pushers = [worker for worker, last in enumerate(pushed) if last == number]
    if pushers:
        unfinished = [member for member in servers or pushers if stepped[member] < number]
        if not unfinished:
            return True
        dead = [worker for worker in pushers if since[worker] > number]
        # The living do what is left of the shares of the dead.
        alive = [member for member in (*unfinished, *pushers) if member not in dead]
        if alive:
            return Waiting(alive[0], f"member {unfinished[0]} is not done with round {number}")
    elif max(stepped) >= number:
        return True  # it was closed empty
    closed = close_round(number, pushed, board, since, asked)
    return Abandoned(closed.contributors) if isinstance(closed, Closed) else closed


def reached(number: int, column: Column, members: Sequence[int]) -> Closed | Waiting:
    """Have all ``members`` (workers, then servers) come to round ``number`` in this column of theirs?"""
    for member in members:
        if column[member] < number:
            return Waiting(member, f"member {member} is not done with round {number}")
    return Closed(tuple(members))


def at_work(number: int, stepped: Column, servers: Sequence[int], crew: Column) -> Sequence[int]:
    """Of all ``servers`` those that step round ``number``, which is the last that has begun: the first, and as soon as
    that has done so the whole ``crew``, whose number it has told then."""
    if not servers or stepped[servers[0]] < number:
        return servers[:1]
    return servers[: crew[0]]


def barrier_open(loader: int, number: int, board: Board) -> bool:
    """Have all workers that are not gone finished ``number`` passes over ``loader``?"""
    return holding(loader, number, board) is None


def holding(loader: int, number: int, board: Board) -> Waiting | None:
    """The first worker that keeps the end of pass ``number`` shut, or None when it is open."""
    passes = board.passes(loader)
    while True:
        joins = board.joins
        for worker in range(board.width):
            # gone is read last: a worker that finishes its pass and leaves between the two reads counts as done.
            if passes[worker] < number and board.gone[worker] != LEFT:
                return Waiting(worker, f"worker {worker} has not finished its part of the data")
        if board.joins == joins:
            return None
