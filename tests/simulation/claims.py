"""What must be true of a schedule: watched from outside while it runs, and counted when it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from paceline.config import Async, Bounded, Local, Quorum
from paceline.data.ledger import RING
from paceline.protocol.deals import Deal
from paceline.protocol.log import Entry, Log
from paceline.protocol.rounds import AWAY, DEAL, EMPTY, LEFT, TAIL, deal_parked_at, parked_at, place_of
from tests.simulation import known
from tests.simulation.memory import LOADERS, Host
from tests.simulation.plans import Plan

Batch: TypeAlias = "tuple[int, int]"  # pass, place in its global order; pass -1 is an evaluation
Folded: TypeAlias = "dict[int, tuple[Batch, ...]]"  # worker -> what its gradient was computed on

_COMPUTING = 3  # turns


class Claims:
    """``before``: the batches that count in the run that this one continues, ``number``: its last round, or version;
    ``loads``: how many checkpoints its scripts had loaded."""

    def __init__(self, host: Host, plan: Plan, before: Sequence[Batch] = (), number: int = 0, loads: int = 0) -> None:
        self._host, self._plan, self._before, self._number = host, plan, before, number
        self._steppers: dict[int, tuple[tuple[int, ...], int]] = {}  # round -> contributors, shares
        self._stepped: dict[int, dict[tuple[int, int, int], Folded]] = {}  # round or entry -> chunk -> what was folded
        self._entries: dict[int, list[int]] = {}  # part -> entries stepped
        self._norms: dict[int, dict[int, float]] = {}  # round -> worker -> what it was told
        self._computing: set[int] = set()
        self._busy: set[int] = set()  # computing, or in the step that comes of it
        self._killed: set[int] = set()
        self._reading: dict[int, list[Batch]] = {}  # batches that a worker's script has had, since its last step
        self.read_batches: list[Batch] = []
        self._read_by: dict[int, list[Batch]] = {}  # since there was a process with this rank
        self.in_hand: list[Batch] = []  # of those whose script was over, and no step was taken
        self._with_killed: list[tuple[int, Batch]] = []  # workers, and what they had in hand
        self._in_periods: list[tuple[int, Batch]] = []  # and what they had taken local steps with
        self.given_up: set[int] = set()
        # Where they are not leased: who has shared a pass, and been given up before or within it.
        self._sharers: dict[int, set[int]] = {}
        self._lost: dict[int, set[int]] = {}
        self._leaving: set[int] = set()  # a pass is drained that they were in
        self.stepping: set[str] = set()  # names of tasks
        self.on_step: Callable[[], None] = lambda: None
        self._loads = [loads] * plan.places  # that each worker's process has come back from
        self._loaded = loads  # that lie in shared memory
        self.puts_so_far = 0
        self._putting: set[str] = set()  # names of tasks
        self._drawn: dict[int, list[Batch]] = {}  # by lease, by whom, in order
        # What was in hand of who was killed, and did not fit in its ring any more; and when the checkpoint was made.
        self.fallen: set[Batch] = set()
        self.fallen_then: set[Batch] = set()
        self.kills = 0
        self.saved: dict[int, list[Batch]] = {}  # what counted when the checkpoint of a round, or version, was made
        self.met: Counter[str] = Counter()  # what was there to be seen
        host.on_park, host.on_drain, host.on_leave = self._parks, self._drains, self._leaves
        host.on_draw = lambda rank, batch: self._drawn.setdefault(rank, []).append(batch)

    def turn(self) -> None:
        self._host.scheduler.turn()

    @property
    def _task(self) -> str:
        return repr(self._host.scheduler.current)

    # --- watched ---

    def agrees(self, number: int, contributors: tuple[int, ...], share: int, shares: int) -> None:
        known = self._steppers.setdefault(number, (contributors, shares))
        assert known == (contributors, shares), f"round {number} was closed with {known[0]} and with {contributors}"
        self.met["a round without some"] += len(contributors) < self._plan.workers
        if not self._plan.servers:
            self.met["a share stepped for another"] += self._task != f"worker {contributors[share]}"
        for worker in contributors:
            pushed = self._host.exchange.raw("pushed")[worker]
            assert pushed == number, f"round {number} is folded while worker {worker} is at {pushed}"

    def may_push(self, rank: int) -> None:
        if self._plan.parts or not self._steppers:
            return
        last = max(self._steppers)
        assert self._is_complete(last), f"worker {rank} is about to push before all of round {last} is stepped"

    def stepped(self, number: int, chunk: tuple[int, int, int], folded: Folded) -> None:
        by_chunk = self._stepped.setdefault(number, {})
        assert chunk not in by_chunk, f"chunk {chunk} is stepped twice for {number}"
        for other in by_chunk.values():
            assert other == folded, f"{number}: one share was stepped with {other}, another with {folded}"
        by_chunk[chunk] = dict(folded)
        if self._plan.parts:
            entries = self._entries.setdefault(chunk[0], [])
            assert chunk[2] == 0 or entries[-1] == number
            if chunk[2] == 0:
                assert not entries or entries[-1] < number, f"part {chunk[0]}: entry {number} after {entries[-1]}"
                entries.append(number)

    def begin_step(self, found: int | None) -> None:
        """``found``: how many times the state that it steps with had been loaded."""
        assert not self._putting, f"{self._task} steps while {self._putting} puts a checkpoint in place"
        assert found == self.puts_so_far, f"{self._task} steps with the state of load {found} of {self.puts_so_far}"
        self.stepping.add(self._task)
        self.on_step()

    def end_step(self) -> None:
        self.stepping.discard(self._task)

    def forgets(self) -> None:
        """A process lets go of the state that it has found."""
        assert not self._plan.parts or any(self._plan.loads), f"{self._task} lets go of state that nobody has loaded"

    def starts(self, rank: int) -> None:
        """A process."""
        self._loads[rank] = 0

    def puts(self, rank: int) -> None:
        """Worker ``rank`` puts a checkpoint that its script has loaded in place of what all share."""
        assert not self.stepping, f"worker {rank} puts a checkpoint in place while {self.stepping} steps"
        if not self._plan.parts and self._steppers:
            last = max(self._steppers)
            assert self._is_complete(last), f"worker {rank} puts a checkpoint in place before round {last} is stepped"
        passes, gone = self._passes(0), self._host.board.raw("gone")
        behind = [w for w in range(self._plan.places) if gone[w] != LEFT and passes[w] < passes[rank]]
        assert not gone[rank] or not behind, f"worker {rank}, which nobody waits for, puts a checkpoint before {behind}"
        self._putting.add(self._task)
        self.puts_so_far += 1
        self.turn()
        self.turn()
        assert not self.stepping, f"while worker {rank} puts a checkpoint in place {self.stepping} steps"
        self._putting.discard(self._task)
        self._loaded = max(self._loaded, self._loads[rank] + 1)

    def has_loaded(self, rank: int, loads: int) -> None:
        """The script of worker ``rank`` has loaded so many checkpoints, and goes on with what all share."""
        self._loads[rank] = loads
        assert self._loaded >= loads, f"worker {rank} has loaded checkpoint {loads}, which nobody has put in place"

    def closes(self, entry: Entry) -> None:
        """Under the lock: a quorum is as many as it takes, or all who are there."""
        pace = self._plan.pace
        if isinstance(pace, Quorum):
            members = set(entry.members)
            assert len(members) <= pace.count, f"a quorum of {pace.count} is closed with {members}"
            missed = self._computing - members
            assert len(members) == pace.count or not missed, f"a quorum is closed with {members}, without {missed}"

    def applies(self, part: int, entry: Entry) -> None:
        """A STEP is about to be applied to a part, or what another has left of it."""
        if self._entries.get(part, [0])[-1] == entry.number:
            return
        version = self.version(part)
        assert entry.version == version + 1, f"entry {entry.number} makes version {entry.version} of {version}"
        for member in entry.members:
            stale = version - self._host.slots[member].copy.get(part, self._number)
            assert entry.staleness == stale, f"entry {entry.number}: worker {member} is stale by {stale}: {entry}"

    def version(self, part: int) -> int:
        """How many STEPs the part has had."""
        return self._number + len(self._entries.get(part, ()))

    def saves(self, number: int) -> None:
        """What all share goes into checkpoint ``number``, and nobody steps meanwhile."""
        self.saved[number] = [*self._before, *self.counted]
        fell = {batch for drawn in self._drawn.values() for batch in drawn[: -self._plan.ring]}
        self.fallen_then = self.fallen | fell

    def may_copy(self, copy: dict[int, int]) -> None:
        rank = next(rank for rank, slot in enumerate(self._host.slots) if slot.copy is copy)
        assert rank not in self._computing, f"the copy of worker {rank} changes while it computes on it"

    def norm(self, rank: int, value: float) -> None:
        """Worker ``rank`` has asked for a norm. All who do in a round are told the same, but who takes no part (1)."""
        if value != 1.0:
            number = self._host.exchange.raw("asked")[rank]
            told = self._norms.setdefault(number, {})
            told[rank] = value
            same = set(told.values()) == {value} or (self.kills and not known.NORMS_OF_THE_DEAD)
            assert same, f"norm {number} is told differently: {told}"

    def _parks(self, rank: int, before: int, now: int) -> None:
        """Nobody passes the end of a pass before all who are not gone for good have finished it; who had nothing to
        read may where others evaluate, or where everybody stands. Nobody goes on at a tail for nothing."""
        assert rank not in self._leaving or self._task != f"worker {rank}", f"worker {rank} has not left"
        board = self._host.board
        if not before or now or self._task != f"worker {rank}" or parked_at(before) >= LOADERS:
            return
        if board.raw("settled")[rank] < board.raw("deaths")[rank]:
            return  # a newcomer draws the consequences of the death of its own predecessor
        loader, workers = parked_at(before), range(self._plan.places)
        passes, gone, parked = self._passes(loader), board.raw("gone"), board.raw("parked")
        if before & (TAIL | DEAL):
            may = board.raw("drained")[loader] > passes[rank] or (
                board.raw("returned")[loader]
                if before & TAIL
                else board.raw("deals")[place_of(loader, passes[rank])] > deal_parked_at(before)
            )
            if before & EMPTY and not may:
                dead = board.raw("deaths")
                stand = all(parked[w] or gone[w] or dead[w] or w in self._killed for w in workers if w != rank)
                may = board.raw("evaluated")[loader] or stand
            assert may, f"worker {rank} goes on from the tail of loader {loader}"
            return
        late = [other for other in workers if passes[other] < passes[rank] and gone[other] != LEFT]
        if late and before & EMPTY and not board.raw("evaluated")[loader]:
            # Who stood there and has been killed since is no longer parked.
            dead = board.raw("deaths")
            late = [other for other in late if not parked[other] and not dead[other] and other not in self._killed]
        elif before & EMPTY:
            late = []  # an evaluation
        assert not late, f"worker {rank} passes the end of pass {passes[rank]} over loader {loader} before {late}"

    def _drains(self, loader: int, before: int, now: int) -> None:
        """A pass is drained when nothing has come back, and everybody is at its tail, has finished it, or leaves."""
        board, passes = self._host.board, self._passes(loader)
        assert not board.raw("returned")[loader], f"pass {now} is drained while batches lie on the table"
        for worker, (gone, parked) in enumerate(zip(board.raw("gone"), board.raw("parked"), strict=False)):
            at_tail = parked_at(parked) == loader and bool(parked & (TAIL | DEAL))
            is_own = self._task == f"worker {worker}"
            there = worker >= self._plan.places or gone or passes[worker] + (at_tail or is_own) >= now
            if not there and is_own:
                self._leaving.add(worker)  # it is LEFT before it does anything else
                continue
            assert there or worker in self.given_up, f"pass {now} is drained while worker {worker} is in it"

    def _leaves(self, rank: int, before: int, now: int) -> None:
        """From here on rounds are closed without worker ``rank``, and without who stands at a tail that is not said to
        be drained: nobody may be held there by that worker alone."""
        if now == LEFT:
            self._leaving.discard(rank)
        board, places = self._host.board, range(self._plan.places)
        gone, parked = board.raw("gone"), board.raw("parked")
        for worker in places if now == LEFT != before else ():
            loader = parked_at(parked[worker])
            if gone[worker] or worker == rank or not parked[worker] & (TAIL | DEAL) or board.raw("returned")[loader]:
                continue
            passes = self._passes(loader)
            done = [one for one in places if one == rank or gone[one] == LEFT or passes[one] > passes[worker]]
            stand = [one for one in places if not gone[one] and parked[one] & ~EMPTY == parked[worker] & ~EMPTY]
            stand = [one for one in stand if passes[one] == passes[worker]]
            place = place_of(loader, passes[worker])
            is_due = not board.raw("lost")[place] and {*done, *stand} == set(places)
            newest = board.raw("deals")[place]
            may = board.raw("drained")[loader] > passes[worker] or newest > deal_parked_at(parked[worker])
            assert may or not is_due, f"worker {rank} has left, and worker {worker} is not told that a pass is drained"

    def _passes(self, loader: int) -> list[int]:
        first = self._host.board.place("passes")[0] + loader * self._plan.places
        return [self._host.board.stored.get(first + worker, 0) for worker in range(self._plan.places)]

    def deals(self, rank: int, number: int, deal: Deal) -> None:
        """A worker reads a part of pass ``number``."""
        self._sharers.setdefault(number, set()).add(rank)
        self.met["another deal"] += bool(deal.before)
        self.met["a third deal"] += len(deal.before) > 1

    @property
    def _has_periods(self) -> bool:
        pace = self._plan.pace
        return isinstance(pace, Local) or (isinstance(pace, Async) and pace.every > 1)

    def gives_up(self, rank: int) -> None:
        """Nobody takes the place of worker ``rank``, which has been killed."""
        self.given_up.add(rank)
        self.met["given up"] += 1
        for number in range(self._passes(0)[rank], len(self._plan.batches)):
            self._lost.setdefault(number, set()).add(rank)

    def read(self, rank: int, batch: Batch) -> None:
        assert rank not in self._leaving, f"worker {rank} has not left"
        self.read_batches.append(batch)
        self._reading.setdefault(rank, []).append(batch)
        self._read_by.setdefault(rank, []).append(batch)

    def compute(self, rank: int) -> None:
        """Worker ``rank`` computes on its copy of the parameters, which takes a few turns of its own."""
        copy = self._host.slots[rank].copy
        assert len(set(copy.values())) <= 1, f"worker {rank} computes on parts of different versions: {copy}"
        self._computing.add(rank)
        self._busy.add(rank)
        if isinstance(self._plan.pace, Bounded) and (not self.kills or known.NEWCOMERS_JOIN_WITHIN_THE_BOUND):
            clocks = self._host.exchange.raw("clocks")
            slowest = min(self._busy, key=lambda other: clocks[other])
            ahead = clocks[rank] - clocks[slowest]
            assert ahead <= self._plan.pace.staleness, f"worker {rank} is {ahead} steps ahead of worker {slowest}"
        for _ in range(_COMPUTING):
            self.turn()
        self._computing.discard(rank)

    def step(self, rank: int) -> None:
        """The script has taken a step with all that it has read."""
        self._reading.pop(rank, None)
        self._busy.discard(rank)

    def keeps(self, rank: int) -> None:
        """It keeps a gradient for the step after the next batch, if there is one."""
        self._busy.discard(rank)

    def dies(self, rank: int) -> None:
        """Worker ``rank`` has been killed."""
        self.kills += 1
        self._killed.add(rank)
        self._leaving.discard(rank)
        before = self._host.board.raw("deaths")[rank]
        self.met["killed again"] += before > 0
        self.met["killed before it joined"] += before > 0 and self._host.board.raw("gone")[rank] == AWAY
        self.met["killed in a step"] += f"worker {rank}" in self.stepping
        self.stepping.discard(f"worker {rank}")
        self._putting.discard(f"worker {rank}")
        in_hand = self._reading.pop(rank, [])
        counted, read = set(self.counted), self._read_by.pop(rank, [])
        in_period = [batch for batch in read if self._has_periods and batch not in counted]
        self._with_killed += [(rank, batch) for batch in in_hand]
        self._in_periods += [(rank, batch) for batch in in_period]
        drawn = self._drawn.pop(rank, [])
        self.fallen |= {*in_hand, *in_period} & {*drawn[: -self._plan.ring]}
        self.leave(rank)

    def leave(self, rank: int) -> None:
        self._computing.discard(rank)
        self._busy.discard(rank)
        self.in_hand += self._reading.pop(rank, [])

    # --- counted ---

    def check(self) -> None:
        """When all have ended."""
        self._check_steps()
        counted, read, in_hand = Counter(self.counted), Counter(self.read_batches), Counter(self.in_hand)
        assert counted <= read, f"counted, but not read: {counted - read}"
        if not self.kills and not isinstance(self._plan.pace, Quorum | Local):  # may drop pushes, or local steps
            assert counted + in_hand == read, f"read {read}, counted {counted}, in hand {in_hand}"
        if self._plan.trains_on_all:
            counted += Counter(self._before)
            twice = sorted(batch for batch, times in counted.items() if times > 1)
            assert not twice, f"counted twice: {twice}"
            missing = sorted(set(self._due()) - set(counted) - set(in_hand) - self._gone_with_killed())
            assert not missing, f"not counted: {missing}"
            self._check_ledger(counted)

    def _gone_with_killed(self) -> set[Batch]:
        """What they had in hand comes again by lease, but where nobody was left for it, or the ring was too short."""
        plan = self._plan
        if not plan.leased:
            # What was read behind the last step of a finished pass, or deal, is gone.
            return {batch for _, batch in self._with_killed if any(max(one.accumulate) > 1 for one in plan.scripts)}
        gone = (*self._with_killed, *self._in_periods)
        return {batch for rank, batch in gone if rank in self.given_up} | self.fallen

    def _check_ledger(self, counted: Counter[Batch]) -> None:
        words = self._host.ledgers[0].stored
        if self._plan.leased and words.get(0) and not self.given_up:
            epoch, committed = words[0] - 1, words.get(2, 0)
            truly = sum(1 for number, _ in counted if number == epoch)
            if self._plan.ring < RING and self.kills:
                return  # it counts what is in hand where the ring is full
            assert committed == truly, f"of epoch {epoch} {truly} batches count, the ledger says {committed}"

    @property
    def counted(self) -> list[Batch]:
        folds = [next(iter(chunks.values())) for _, chunks in sorted(self._stepped.items())]
        return [batch for folded in folds for batches in folded.values() for batch in batches]

    def _check_steps(self) -> None:
        """All is applied that was pushed, but for what nobody is left to read: the last that those have pushed who were
        given up, behind all that the others have."""
        plan = self._plan
        if not plan.parts:
            pushed = dict(enumerate(self._host.exchange.raw("pushed")[: plan.places]))
            last = max((number for rank, number in pushed.items() if rank not in self.given_up), default=0)
            empty = set(range(self._number + 1, max(self._steppers, default=0))) - set(self._steppers)
            # Those in which only the dead had asked for a norm.
            assert not empty or (plan.clips and self.kills), f"nobody has stepped rounds {sorted(empty)}"
            for number in self._steppers:
                assert self._is_complete(number) or number > last, f"round {number} is not stepped whole"
            return
        applied = self._host.exchange.raw("applied")
        start, stop = self._host.exchange.place("log")
        log = Log([self._host.exchange.stored.get(place, 0) for place in range(start, stop)], plan.places)
        left = range(min(applied) + 1, log.appended + 1)
        of_others = [number for number in left if log.entry(number).by not in self.given_up]
        assert not of_others, f"entries {of_others} of {log.appended} are not applied everywhere: {applied}"
        self.met["never applied"] += len(left)
        chunks = {chunk for by_chunk in self._stepped.values() for chunk in by_chunk}
        for number, by_chunk in self._stepped.items():
            assert set(by_chunk) == chunks or number in left, f"entry {number} was stepped for {sorted(by_chunk)} only"

    def _is_complete(self, number: int) -> bool:
        _, shares = self._steppers[number]
        chunks = self._stepped.get(number, {})
        return all((share, shares, chunk) in chunks for share in range(shares) for chunk in (0, 1))

    def _due(self) -> list[Batch]:
        """Every batch; where they are dealt by number not those of a pass of which everybody was given up."""
        due = []
        for number, count in enumerate(self._plan.batches):
            left = self._sharers.get(number, set()) - self._lost.get(number, set())
            if left or self._plan.leased or not self.given_up:
                due += [(number, ordinal) for ordinal in range(count)]
        return due
