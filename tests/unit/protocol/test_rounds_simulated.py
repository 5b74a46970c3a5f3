"""The laws of rounds under every interleaving that a seeded scheduler thinks of.

Workers and servers are coroutines over plain columns. One turn of a coroutine reads or writes one cell, also within
``close_round``, ``held_at_end`` and ``reached``: those are run again from their first read, with what was read before,
until they come to a cell they have not seen, which is read a turn later. Sleepers wake only when the member they
sleep on rings, so a lost wake-up is a deadlock here.

A failing seed is named in the failure; to replay it with a trace of its turns:

    PYTHONPATH=. python tests/unit/protocol/test_rounds_simulated.py SEED
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from paceline.engine.server import _next
from paceline.protocol.rounds import (
    EMPTY,
    TAIL,
    Waiting,
    close_round,
    held_at_end,
    is_drained,
    more_at_tail,
    reached,
)
from paceline.transport.channel import Channel

SEEDS = 2000
TURNS = 200_000  # far more than any of these runs needs: a run that takes them all is a livelock
TRAIN, EVALUATE = 0, 1  # the loaders

T = TypeVar("T")
Steps = Generator[None, None, T]  # a yield is the end of a turn
Batch = tuple[int, int, int]  # worker, pass, place in it


@dataclass(frozen=True)
class Plan:
    """What one worker's script does. ``batches[p]`` is how many it has in pass p."""

    batches: tuple[int, ...]
    breaks_after: tuple[int | None, ...]  # in pass p, leave after so many batches
    steps_after_break: tuple[bool, ...]  # step once more outside of the loader
    accumulate: tuple[int, ...]
    evaluates: tuple[int | None, ...]  # batches of the evaluation after the pass; on all workers, or on none
    evaluates_every: int | None  # and in the midst of a pass, as many as after the first
    ends_in: int | None  # the script ends in this pass: after its break, or after its end
    pool: int | None  # batches of every pass that are drawn by lease, in place of ``batches``; the same on all workers
    ahead: int  # drawn ahead of the one in hand, by lease


@dataclass
class World:
    """The shared memory, and what the claims are checked against."""

    workers: int
    servers: int
    pushed: list[int] = field(init=False)
    stepped: list[int] = field(init=False)
    since: list[int] = field(init=False)
    gone: list[int] = field(init=False)
    parked: list[int] = field(init=False)
    passes: list[list[int]] = field(init=False)
    evaluated: list[int] = field(init=False)
    returned: list[int] = field(init=False)
    drained: list[int] = field(init=False)
    locked: bool = False
    epoch: int = -1  # the pass that the ledger is open for
    pool: int = 0
    table: list[Batch] = field(default_factory=list)  # what can be drawn by lease
    kept: dict[int, Batch] = field(default_factory=dict)  # a first batch for each worker
    lost: list[Batch] = field(default_factory=list)
    took_back: int = 0
    drained_passes: set[int] = field(default_factory=set)  # of which a worker was told that they are drained
    events: list[int] = field(init=False)
    slots: list[tuple[Batch, ...]] = field(init=False)
    rounds: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)  # round -> stepper -> contributors
    folded: dict[int, dict[int, dict[int, tuple[Batch, ...]]]] = field(default_factory=dict)  # by round, by stepper
    drawn: list[Batch] = field(default_factory=list)
    left_over: list[Batch] = field(default_factory=list)  # behind a worker's last step

    def __post_init__(self) -> None:
        members = self.workers + self.servers
        self.pushed, self.gone, self.parked = [0] * self.workers, [0] * self.workers, [0] * self.workers
        self.stepped, self.events, self.since = [0] * members, [0] * (members + 1), [0] * self.workers
        self.evaluated, self.returned, self.drained = [0, 0], [0, 0], [0, 0]
        self.passes = [[0] * self.workers for _ in (TRAIN, EVALUATE)]
        self.slots = [()] * self.workers


# --- one cell a turn ---


class _Unread(BaseException):
    def __init__(self, cells: Sequence[int], index: int) -> None:
        self.cells, self.index = cells, index


class _Cells(Sequence[int]):
    """A column of which reads are answered from ``known``, in the order they come, then refused."""

    def __init__(self, cells: list[int], known: Iterator[int]) -> None:
        self._cells, self._known = cells, known

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]  # a column is never sliced
        if index >= len(self._cells):
            raise IndexError(index)  # how ``for`` and ``max`` find the end
        for value in self._known:
            return value
        raise _Unread(self._cells, index)


class _Reading:
    """The columns of the world, read a cell a turn; a board and an exchange's memory in one."""

    published = 1

    def __init__(self, world: World, known: Iterator[int]) -> None:
        self.workers = world.workers
        self.common = world.workers + world.servers
        self.pushed, self.stepped, self.since, self.gone, self.parked, self.events = (
            _Cells(column, known)
            for column in (world.pushed, world.stepped, world.since, world.gone, world.parked, world.events)
        )
        self.evaluated, self.returned, self.drained = (
            _Cells(column, known) for column in (world.evaluated, world.returned, world.drained)
        )
        self._passes = [_Cells(column, known) for column in world.passes]

    def passes(self, loader: int) -> _Cells:
        return self._passes[loader]


def ask(world: World, question: Callable[[_Reading], T]) -> Steps[T]:
    """The answer to a question about the world, each of whose reads is a turn of its own."""
    known: list[int] = []
    while True:
        try:
            return question(_Reading(world, iter(known)))
        except _Unread as unread:
            yield
            known.append(unread.cells[unread.index])


def put(column: list[int], index: int, value: int) -> Steps[None]:
    yield
    column[index] = value


def ring(world: World, member: int) -> Steps[None]:
    yield
    world.events[member] += 1


def lock(world: World) -> Steps[None]:
    yield
    while world.locked:
        yield
    world.locked = True


def unlock(world: World) -> Steps[None]:
    yield
    world.locked = False


def ring_all(world: World, member: int) -> Steps[None]:
    yield from ring(world, member)
    yield from ring(world, world.workers + world.servers)


class Asleep:
    """Yielded by a sleeper until ``events[on]`` is no longer what it saw."""

    def __init__(self, on: int, seen: int, reason: str) -> None:
        self.on, self.seen, self.reason = on, seen, reason


def wait(world: World, question: Callable[[_Reading], T | Waiting]) -> Generator[Asleep | None, None, T]:
    """As transport/board.py waits: look, note the count of changes, look again, sleep while the count is the same."""
    answer = yield from ask(world, question)
    while isinstance(answer, Waiting):
        yield
        seen = world.events[answer.on]
        again = yield from ask(world, question)
        if isinstance(again, Waiting) and again.on == answer.on:
            yield Asleep(answer.on, seen, answer.reason)
            again = yield from ask(world, question)
        answer = again
    return answer


# --- what workers and servers do ---


def take_part(world: World, member: int, number: int, contributors: tuple[int, ...]) -> Steps[None]:
    """Fold and step a share, as engine/stepper.py does; ``last`` is whom the shares were divided among."""
    agreed = world.rounds.setdefault(number, {})
    agreed[member] = contributors
    assert len(set(agreed.values())) == 1, f"steppers of round {number} disagree on its contributors: {agreed}"
    for contributor in contributors:
        yield
        assert world.pushed[contributor] == number, (
            f"member {member} folds round {number} while worker {contributor} is at {world.pushed[contributor]}"
        )
        world.folded.setdefault(number, {}).setdefault(member, {})[contributor] = world.slots[contributor]
    yield from put(world.stepped, member, number)
    yield from ring(world, member)


def exchange(world: World, me: int, batches: tuple[Batch, ...]) -> Steps[None]:
    """``optimizer.step()``, as engine/exchange.py does it."""
    number = (yield from ask(world, lambda columns: max(columns.stepped))) + 1
    yield
    world.slots[me] = batches
    # Nobody may be folding the slot, and nobody may have been left behind in the round before.
    steppers = world.rounds.get(number - 1, {})
    assert all(world.stepped[member] >= number - 1 for member in steppers), (
        f"worker {me} pushes round {number} before all of {sorted(steppers)} stepped round {number - 1}"
    )
    yield from put(world.pushed, me, number)
    assert all(me in contributors for contributors in world.rounds.get(number, {}).values()), (
        f"worker {me} pushes round {number}, which was closed without it"
    )
    yield from ring(world, me)
    if world.servers:
        servers = tuple(range(world.workers, world.workers + world.servers))
        yield from wait(world, lambda columns: reached(number, columns.stepped, servers))
        return
    closed = yield from wait(world, lambda columns: close_round(number, columns.pushed, columns, columns.since))
    yield from take_part(world, me, number, closed.contributors)
    yield from wait(world, lambda columns: reached(number, columns.stepped, closed.contributors))


def finish_pass(world: World, me: int, loader: int) -> Steps[None]:
    yield from lock(world)
    yield from put(world.passes[loader], me, world.passes[loader][me] + 1)
    yield from drain(world, loader)
    yield from unlock(world)
    yield from ring_all(world, me)


def drain(world: World, loader: int, arriving: int | None = None) -> Steps[None]:
    """Under the lock, as engine/worker.py does it."""
    before = world.drained[loader]
    while (yield from ask(world, lambda columns: is_drained(loader, columns.drained[loader] + 1, arriving, columns))):
        yield from put(world.drained, loader, world.drained[loader] + 1)
    if world.drained[loader] > before:
        yield from ring(world, world.workers + world.servers)


def open_ledger(world: World, number: int, pool: int) -> Steps[None]:
    """What data/ledger.py does when a pass begins; here, what came back is what stands first on the table."""
    yield from lock(world)
    if world.epoch != number:
        world.epoch, world.pool = number, pool
        world.lost += [*world.table, *world.kept.values()]
        world.table = [(-1, number, place) for place in range(pool)]
        present = [worker for worker in range(world.workers) if not world.gone[worker]]
        world.kept = {worker: world.table.pop(0) for worker in present[:pool]}
        yield from tell_returned(world, 0)
    yield from unlock(world)


def draw(world: World, me: int, count: int) -> Steps[list[Batch]]:
    """The next batches of a pass, by lease; at most ``count``."""
    yield from lock(world)
    drawn = [world.kept.pop(me)] if me in world.kept else []
    from_table = [world.table.pop(0) for _ in range(min(count - len(drawn), len(world.table)))]
    yield from tell_returned(world, max(0, world.returned[TRAIN] - len(from_table)))
    yield from unlock(world)
    return drawn + from_table


def give_back(world: World, me: int, batches: list[Batch]) -> Steps[None]:
    yield from lock(world)
    yield from forgo(world, me, batches)
    yield from unlock(world)


def forgo(world: World, me: int, batches: list[Batch]) -> Steps[None]:
    batches = batches + ([world.kept.pop(me)] if me in world.kept else [])
    world.took_back += len(batches)
    world.table = batches + world.table
    yield from tell_returned(world, world.returned[TRAIN] + len(batches))


def tell_returned(world: World, count: int) -> Steps[None]:
    """Under the lock."""
    if world.returned[TRAIN] != count:
        yield from put(world.returned, TRAIN, count)
        yield from ring(world, world.workers + world.servers)


def more(world: World, me: int) -> Steps[bool]:
    """Wait at the tail of a pass over the training loader, as engine/worker.py does it."""
    yield from lock(world)
    yield from drain(world, TRAIN, arriving=me)
    found: bool = world.returned[TRAIN] > 0
    parks = not found and world.drained[TRAIN] <= world.passes[TRAIN][me]
    if parks:
        yield from put(world.parked, me, TRAIN + 1 + TAIL)
    yield from unlock(world)
    if parks:
        yield from ring_all(world, me)
        while world.parked[me]:
            yield from wait(world, lambda columns: more_at_tail(me, columns))
            yield from lock(world)
            answer = yield from ask(world, lambda columns: more_at_tail(me, columns))
            if not isinstance(answer, Waiting):
                found = answer
                yield from put(world.parked, me, 0)
            yield from unlock(world)
        yield from ring_all(world, me)
    if not found:
        world.drained_passes.add(world.passes[TRAIN][me])
    return found


def await_all(world: World, me: int, loader: int, *, empty: bool = False) -> Steps[None]:
    """The barrier at the end of a pass, as engine/worker.py keeps it."""
    yield from put(world.parked, me, loader + 1 + (EMPTY if empty else 0))
    yield from ring_all(world, me)
    yield from wait(world, lambda columns: held_at_end(me, columns) or 1)
    yield from put(world.parked, me, 0)
    if empty:
        yield from ring_all(world, me)


def evaluate(world: World, me: int, batches: int | None) -> Steps[None]:
    """A pass without a step, of which this worker may have nothing to read."""
    if batches:
        yield from put(world.evaluated, EVALUATE, 1)
        yield from ring_all(world, me)
    elif batches is not None:
        yield from finish_pass(world, me, EVALUATE)
        yield from await_all(world, me, EVALUATE, empty=True)


def work(world: World, me: int, plan: Plan) -> Steps[None]:
    """A training script: passes with rounds, evaluations without, breaks, and an end."""
    pending: tuple[Batch, ...] = ()
    left = knows = False
    steps = 0
    for number, count in enumerate(plan.batches):
        if left:
            yield from await_all(world, me, TRAIN, empty=not knows)
        left, seen, before = False, 0, steps
        leases: list[Batch] = []
        if plan.pool is not None:
            yield from open_ledger(world, number, plan.pool)
        while True:
            if plan.pool is not None and len(leases) <= plan.ahead:
                leases += yield from draw(world, me, plan.ahead + 1 - len(leases))
                if not leases and steps > before and (yield from more(world, me)):
                    continue
            if not leases if plan.pool is not None else seen == count:
                break
            if seen == plan.breaks_after[number] and (seen or plan.pool is None):
                left = True
                break
            batch = (me, number, seen) if plan.pool is None else leases.pop(0)
            world.drawn.append(batch)
            seen += 1
            pending += (batch,)
            if len(pending) >= plan.accumulate[number]:
                yield from exchange(world, me, pending)
                pending = ()
                steps, knows = steps + 1, True
                if plan.evaluates_every and steps % plan.evaluates_every == 0:
                    yield from evaluate(world, me, plan.evaluates[0])
        if plan.pool is not None:
            yield from give_back(world, me, leases)
        yield from finish_pass(world, me, TRAIN)
        if not left:
            yield from await_all(world, me, TRAIN, empty=not knows)
        elif plan.steps_after_break[number]:
            yield from exchange(world, me, pending)
            pending = ()
        if plan.ends_in == number:
            break
        yield from evaluate(world, me, plan.evaluates[number])
    world.left_over += pending
    yield from lock(world)
    yield from forgo(world, me, [])
    yield from put(world.gone, me, 1)
    yield from drain(world, TRAIN)
    yield from unlock(world)
    yield from ring_all(world, me)


def serve(world: World, member: int, nothing: Channel) -> Steps[None]:
    """engine/server.py, with its own question: which round is closed, or on whom does it hang?"""

    def question(columns: _Reading) -> Any:
        served = SimpleNamespace(memory=columns, published_as=0, spec=SimpleNamespace(parts=0))
        return _next(columns, [served], member, nothing.fileno())

    while True:
        answer = yield from wait(world, question)
        if answer is None:
            return
        _, number, contributors = answer
        yield from take_part(world, member, number, contributors)


# --- one run ---


def plans(random_: random.Random, workers: int) -> list[Plan]:
    passes = random_.randint(1, 3)
    evaluates = [random_.random() < 0.4 for _ in range(passes)]
    to_evaluate = random_.randint(1, workers)  # batches, dealt in turn
    evaluates_every = random_.choice((None, 1, 2, 3))
    pool = random_.choice((None, random_.randint(0, 4 * workers)))
    some = random_.choice((0.0, 0.2, 0.5))  # how often anything unusual happens in this run
    found = []
    for rank in range(workers):
        batches = tuple(random_.randint(0, 3) for _ in range(passes))
        breaks = tuple(random_.randint(0, 2) if random_.random() < some else None for _ in range(passes))
        found.append(
            Plan(
                batches=batches,
                breaks_after=breaks,
                steps_after_break=tuple(random_.random() < some for _ in range(passes)),
                accumulate=tuple(random_.choice((1, 1, 2)) for _ in range(passes)),
                evaluates=tuple(int(rank < to_evaluate) if asked else None for asked in evaluates),
                evaluates_every=evaluates_every,
                ends_in=random_.randrange(passes) if random_.random() < some else None,
                pool=pool,
                ahead=random_.choice((0, 0, 1, 3)),
            )
        )
    return found


def simulate(seed: int, trace: Callable[[str], None] | None = None) -> World:
    """One run to its end. Raises AssertionError when a law is broken or nobody can go on."""
    nothing, other_end = Channel.pair()  # the servers' way to a launcher that has nothing to say
    try:
        return _simulate(seed, nothing, trace)
    finally:
        nothing.close()
        other_end.close()


def _simulate(seed: int, nothing: Channel, trace: Callable[[str], None] | None) -> World:
    random_ = random.Random(seed)
    workers, servers = random_.randint(1, 4), random_.choice((0, 0, 0, 1, 2))
    world = World(workers, servers)
    scripts = plans(random_, workers)
    alive: dict[int, Generator[Asleep | None, None, None]] = {
        member: work(world, member, scripts[member]) if member < workers else serve(world, member, nothing)
        for member in range(workers + servers)
    }
    asleep: dict[int, Asleep] = {}
    # Fair runs; runs in which some are much faster; runs in which one goes on alone until its luck turns.
    weight = {member: random_.choice((1, 1, 1, 20)) for member in alive}
    turns_of_luck = random_.choice((1.0, 0.1, 0.02))
    favourite = -1
    if trace:
        trace(f"{workers} workers, {servers} servers")
        for rank, script in enumerate(scripts):
            trace(f"worker {rank}: {script}")
    for _ in range(TURNS):
        awake = [m for m in alive if m not in asleep or world.events[asleep[m].on] != asleep[m].seen]
        if not awake:
            assert not alive, "deadlock: " + "; ".join(f"{m} waits: {asleep[m].reason}" for m in alive)
            return world
        if favourite not in awake or random_.random() < turns_of_luck:
            favourite = random_.choices(awake, [weight[m] for m in awake])[0]
        member = favourite
        asleep.pop(member, None)
        try:
            slept = next(alive[member])
        except StopIteration:
            del alive[member]
            slept = None
        if slept is not None:
            asleep[member] = slept
        if trace:
            what = f"sleeps: {slept.reason}" if slept else "" if member in alive else "has ended"
            trace(f"{member:2} {what:50} {world.pushed} {world.stepped} {world.parked} {world.passes} {world.gone}")
    raise AssertionError(f"no end after {TURNS} turns")


def check(world: World) -> None:
    """What must be true once everyone has ended."""
    assert sorted(world.rounds) == list(range(1, len(world.rounds) + 1)), "a round is missing"
    counted: list[Batch] = []
    for number, by_stepper in world.folded.items():
        contributors = next(iter(world.rounds[number].values()))
        expected = set(contributors) if not world.servers else set(range(world.workers, len(world.stepped)))
        assert set(by_stepper) == expected, f"round {number} was stepped by {sorted(by_stepper)}"
        first = next(iter(by_stepper.values()))
        assert all(other == first for other in by_stepper.values()), f"round {number}: steppers folded other gradients"
        counted += [batch for batches in first.values() for batch in batches]
    assert sorted(counted + world.left_over) == sorted(world.drawn), "a batch was lost, or counted twice"
    assert len(set(world.drawn)) == len(world.drawn)
    # Where there is a batch for everyone; with fewer an idle worker may take the pass for an evaluation, and go ahead.
    left = [batch for batch in world.lost + world.table if world.pool >= world.workers]
    assert not [batch for batch in left if batch[1] in world.drained_passes], f"{left} were left in drained passes"


def run(seed: int) -> None:
    try:
        check(simulate(seed))
    except AssertionError as error:
        error.add_note(f"seed {seed}; replay: PYTHONPATH=. python {sys.modules[__name__].__file__} {seed}")
        raise


BLOCK = 200


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_the_laws_hold_under_any_schedule(first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(seed)


def test_a_run_reaches_what_the_claims_are_about() -> None:
    """The claims are about something: rounds without a worker, moved shares, breaks, early ends, servers, leftovers."""
    worlds = [simulate(seed) for seed in range(100)]
    rounds = [(world, contributors) for world in worlds for by in world.rounds.values() for contributors in by.values()]
    assert any(len(contributors) < world.workers for world, contributors in rounds)
    assert any(len(contributors) == world.workers == 4 for world, contributors in rounds)
    assert any(world.servers == 2 for world, _ in rounds)
    assert any(world.left_over for world in worlds)
    assert any(world.drained_passes and world.took_back for world in worlds)
    assert any(
        len({column[worker] for worker in range(world.workers)}) > 1 for world in worlds for column in world.passes
    )


if __name__ == "__main__":
    check(simulate(int(sys.argv[1]), trace=print))
