"""One schedule: workers, servers and a launcher on a simulated host, with kills, to their ends."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from paceline.config import Quorum
from paceline.data.ledger import RING
from paceline.engine.checkpoint import resume_from
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.effects import (
    Abort,
    Allocate,
    AskToLeave,
    Came,
    Died,
    Done,
    Event,
    Give,
    GiveUp,
    Open,
    Replace,
    Serve,
    Wished,
)
from paceline.protocol.rounds import LEFT
from paceline.transport.channel import Channel
from tests.simulation import known, plans
from tests.simulation.claims import Batch, Claims
from tests.simulation.memory import Host, SimulatedBoard, SimulatedLock
from tests.simulation.scheduler import Scheduler, Task, on_one_core
from tests.simulation.worker import Life, in_place, job_of, serve

_INBOX = "inbox"
_LATE_LOOKS = 2  # for each that is killed
_RESTARTS = 1 << 20


class Saved(Exception):
    """The run is stopped; another goes on from its checkpoint."""


class World:
    """``before``: a run that was stopped, from whose checkpoint this one goes on."""

    def __init__(
        self, seed: int, world: str, trace: Callable[[str], None] | None = None, before: World | None = None
    ) -> None:
        random_, more, rare = (random.Random(f"{what}{world} {seed}") for what in ("", "new ", "rare "))
        self.plan = plan = plans.draw(random_, world, more, rare) if before is None else before.plan.resumed()
        self.scheduler = Scheduler(random_, trace, more if plan.naps else None)
        self.host = Host(self.scheduler, plan.workers, plan.places, plan.servers, plan.server_places, plan.parts)
        self.claims = Claims(self.host, plan)
        self.saved: dict[str, Any] | None = None  # the checkpoint's state
        self.counted: Sequence[Batch] = ()  # the batches that count in it
        self._before = before
        if before is not None:
            assert before.saved is not None
            self.host.resumed = before.saved
            number, loads = (before.saved["exchanges"][0][what] for what in ("number", "loads"))
            pushes_a_step = plan.workers if plan.parts and not isinstance(plan.pace, Quorum) else 1
            self.claims = Claims(self.host, plan, before.counted, number * pushes_a_step, loads)
            self.claims.fallen |= before.claims.fallen_then
        self._seed, self._world, self._random, self._trace = seed, world, random_, trace
        self._lives: dict[int, Life] = {}  # by rank, the newest
        self._tasks: dict[int, Task] = {}
        self._serving: dict[int, Task] = {}  # by rank, the newest
        self._aimed: int | None = None  # the server that is to be killed next
        self.claims.on_step = self._aim
        self._opened = 0
        self._inbox: list[Event] = []
        self.late_looks = 0
        if trace:
            trace(str(plan))

    def run(self) -> Claims:
        """Raises AssertionError where a claim does not hold."""
        if self._is_played():
            self.claims.check()
            return self.claims
        after = World(self._seed, self._world, self._trace, self)
        after.run()
        self.claims.met += after.claims.met
        self.claims.met["resumed"] += 1
        self.claims.met["resumed with others"] += after.plan.workers != self.plan.workers
        return self.claims

    def _is_played(self) -> bool:
        """False: it was stopped."""
        try:
            self._play()
        except Saved:
            return False
        return True

    def _play(self) -> None:
        plan, scheduler = self.plan, self.scheduler
        scheduler.on_kill, scheduler.on_idle = self._kill, self._look_again
        mine, its = Channel.pair()  # the launcher's way to the servers
        try:
            with on_one_core(), in_place(self.host, self.claims, plan.ring):
                if self._before is None:
                    self._start(its)
                scheduler.start("launcher", lambda: self._launch(mine, its))
                if plan.wishes:
                    scheduler.start("user", lambda: self._wish(plan.wishes, Wished))
                if plan.server_wishes:
                    scheduler.start("another", lambda: self._wish(plan.server_wishes, partial(Wished, None)))
                self._plan_kill()
                scheduler.run()
        finally:
            mine.close()
            its.close()

    def _start(self, its: Channel) -> None:
        for rank in range(self.plan.servers):
            self._start_server(rank, its)
        for rank in range(self.plan.workers):
            self._start_worker(rank)

    @property
    def met(self) -> Counter[str]:
        """What there was to be seen in this schedule."""
        plan, met = self.plan, Counter(self.claims.met)
        met.update({"leased": plan.leased, "servers": plan.servers, "naps": plan.naps})
        met["rings that are soon full"] = plan.leased and plan.ring < RING
        met["a checkpoint of the script's own"] = any(plan.loads)
        return met

    def _start_server(self, rank: int, channel: Channel) -> None:
        def live() -> None:
            self._tell(Came("server", rank, messages.Joined(0)))
            serve(self.host, self.claims, rank, channel.fileno())
            self._tell(Died("server", rank, 0, 0))

        self._serving[rank] = self.scheduler.start(f"server {rank}", live)

    def _start_worker(self, rank: int) -> None:
        life = Life(self.host, self.plan, self.claims, rank, lambda message: self._tell(Came("worker", rank, message)))

        def live() -> None:
            life.run()
            self._tell(Died("worker", rank, 0, 0))

        weight = self.plan.weights[rank % len(self.plan.weights)]
        self._lives[rank], self._tasks[rank] = life, self.scheduler.start(f"worker {rank}", live, weight)

    def _wish(self, wishes: Sequence[tuple[int, int]], wished: Callable[[int], Wished]) -> None:
        for turns, number in wishes:
            for _ in range(turns):
                self.scheduler.turn()
            self._tell(wished(number))

    def _tell(self, event: Event) -> None:
        self._inbox.append(event)
        self.scheduler.wake(_INBOX)

    # --- the launcher, as engine/launcher/launcher.py: the real coordinator decides ---

    def _launch(self, to_servers: Channel, its: Channel) -> None:
        board = SimulatedBoard(self.host)
        if self._before is not None:
            resume_from.fill_board(self.host.resumed, board, job_of(self.plan))
            self._start(its)
        board.journal.map(1, self.host.exchange.words)
        for loader, segment in enumerate(self.host.ledgers):
            board.journal.map(100 + loader, segment.words)
        lock = SimulatedLock(self.scheduler, board.journal)
        coordinator = Coordinator(self.plan.workers, self.plan.servers, restarts=0, min_workers=1)
        coordinator._servers._restarts = _RESTARTS
        over, given = False, 0
        while not over:
            while not self._inbox:
                self.scheduler.sleep(_INBOX)
            self.scheduler.turn()
            event = self._inbox.pop(0)
            if isinstance(event, Came) and isinstance(event.message, messages.Kept):
                self._lives[event.message.rank].kept.append(event.message)
                self.scheduler.wake(f"worker {event.message.rank}'s channel")
                continue
            if isinstance(event, Came) and isinstance(event.message, messages.Part):
                self._stop(event.message)
                continue
            if isinstance(event, Died) and event.role == "worker" and event.status:
                coordinator._restarts = 0 if self._gives_up(event.rank) else _RESTARTS
            if isinstance(event, Died):
                lock.try_to_mend()  # it may have been killed while it was leaving
            if isinstance(event, Wished):
                if coordinator.refusal(event.workers, event.servers) is not None:
                    continue
                if event.workers is not None:
                    board.want(event.workers)
            died = isinstance(event, Died) and event.role == "worker" and event.rank not in coordinator.coming
            left = died and board.gone[event.rank] == LEFT
            if left:
                board.wake_all()
            told = coordinator.handle(Came("worker", event.rank, messages.Finished())) if left else []
            for effect in (*told, *coordinator.handle(event)):
                match effect:
                    case Allocate(request=request, workers=workers):
                        given = request.number
                        for rank in workers:
                            self._give(rank, request.number)
                    case Open(rank=rank, role="server") | Replace(rank=rank, role="server"):
                        self._opened += 1
                        self._start_server(rank, its)
                    case Serve(crew=crew, kept=kept):
                        self.claims.met["another crew"] += 1
                        board.set_servers(crew, kept)
                    case Open(rank=rank):
                        self._opened += 1
                        self.claims.met["added"] += 1
                        board.open_place(rank, given)
                        self._start_worker(rank)
                    case AskToLeave(rank=rank):
                        board.ask_to_leave(rank)
                    case Give(rank=rank, number=number):
                        self._give(rank, number)
                    case Replace(rank=rank):
                        lock.try_to_mend()
                        board.tell_death(rank, for_good=False)
                        self._start_worker(rank)
                    case GiveUp(rank=rank):
                        self.claims.gives_up(rank)
                        lock.try_to_mend()
                        board.tell_death(rank, for_good=True)
                    case Abort(failure=failure):
                        raise AssertionError(failure.what)
                    case Done():
                        over = True
        self.host.over = True
        to_servers.send(messages.Stop("all workers have finished"))
        board.wake_all()

    def _stop(self, part: messages.Part) -> None:
        """There is a checkpoint; some time later the run is stopped."""
        self.saved, self.counted = msgspec.json.decode(part.layout), self.claims.saved[part.number]
        for _ in range(self.plan.stops_after):
            self.scheduler.turn()
        raise Saved

    def _give(self, rank: int, number: int) -> None:
        self.scheduler.turn()
        self._lives[rank].given.add(number)
        self.scheduler.wake(f"worker {rank}'s channel")

    def _gives_up(self, rank: int) -> bool:
        others = set(self._lives) - {rank} - self.claims.given_up
        coming, leaving = self.host.board.raw("coming"), self.host.board.raw("leaving")
        others = {other for other in others if not (coming[other] or leaving[other])}
        if not known.LAST_IS_GIVEN_UP:
            others = {other for other in others if self._is_alive(other)}
        if rank == 0 and not self.host.board.stored.get(5) and not known.FIRST_IS_GIVEN_UP_EARLY:
            return False
        return bool(others) and self._random.random() < self.plan.gives_up

    # --- what goes wrong ---

    def _plan_kill(self) -> None:
        every = self.plan.kill_every
        if every is not None and self.claims.kills < self.plan.most_kills:
            self.scheduler.next_kill = self.scheduler.turns + 1 + int(self._random.expovariate(1 / every))
            self.scheduler.look_out()

    def _kill(self) -> None:
        """Kill one worker, or several; they may be asleep, in the midst of a step, or under the lock. With them a
        server; or one alone, in a step."""
        if self._aimed is not None:
            self._kill_server(self._aimed)
            self._aimed = None
            self._plan_kill()
            return
        alive = [rank for rank in sorted(self._lives) if self._is_alive(rank) and self._may_be_killed]
        current = [rank for rank in alive if self._tasks[rank] is self.scheduler.current]
        if alive:
            number = 1 if self._random.random() < 0.8 else self._random.randint(1, len(alive))
            chosen = self._random.sample(alive, number)
            if current and self._random.random() < 0.6 and current[0] not in chosen:
                chosen[0] = current[0]
            for rank in chosen:
                if self._trace:
                    self._trace(f"{self.scheduler.turns:6} --- worker {rank} is killed ---")
                self.claims.met["killed under the lock"] += self.scheduler.holds_lock(self._tasks[rank])
                self.claims.met["killed asleep"] += self._tasks[rank].asleep_on is not None
                self.claims.met["killed with others"] += number > 1
                self.scheduler.kill(self._tasks[rank])
                self.claims.dies(rank)
                self._tell(Died("worker", rank, 0, -signal.SIGKILL))
        serving = [rank for rank, task in sorted(self._serving.items()) if not (task.killed or task.ended)]
        if self.plan.kills_servers and serving and self._random.random() < 0.5:
            self._kill_server(self._random.choice(serving))
        self._plan_kill()

    def _aim(self) -> None:
        """A server that has just begun to step may be killed before it is done, or soon after."""
        ranks = [rank for rank, task in self._serving.items() if task is self.scheduler.current]
        most = self.claims.kills < self.plan.most_kills
        if self.plan.kills_servers and ranks and most and self._random.random() < 0.2:
            (self._aimed,) = ranks
            self.scheduler.next_kill = self.scheduler.turns + self._random.randint(1, 15)
            self.scheduler.look_out()

    def _kill_server(self, rank: int) -> None:
        task = self._serving[rank]
        if task.killed or task.ended:
            return
        if self._trace:
            self._trace(f"{self.scheduler.turns:6} --- server {rank} is killed ---")
        self.claims.met["a server killed in a step"] += f"server {rank}" in self.claims.stepping
        self.claims.stepping.discard(f"server {rank}")
        self.scheduler.kill(task)
        self.claims.kills += 1
        self._tell(Died("server", rank, 0, -signal.SIGKILL))

    def _is_alive(self, rank: int) -> bool:
        if self.host.board.raw("gone")[rank] == LEFT and not known.LEFT_ARE_KILLED:
            return False
        return not (self._tasks[rank].killed or self._tasks[rank].ended)

    @property
    def _may_be_killed(self) -> bool:
        """Has somebody taken up what the run goes on from?"""
        ledgers = self.host.ledgers if self.plan.leased else ()
        taken_up = self.host.board.stored.get(5) and all(ledger.stored for ledger in ledgers)
        return self._before is None or known.RESUMED_ARE_KILLED_AT_ONCE or bool(taken_up)

    def _look_again(self) -> bool:
        """All are asleep, of whom some may look again without being woken: after a death, and only then."""
        self.late_looks += 1
        asleep = [task for task in self.scheduler.asleep if task in self.host.boards]
        asleep = [task for task in asleep if self.host.boards[task].may_sleep_through(self.host, task)]
        if self.late_looks > _LATE_LOOKS * (self.claims.kills + self._opened) + self.plan.server_places + len(
            self.plan.server_wishes
        ):
            return False
        for task in asleep:
            self.scheduler.rouse(task)
        return bool(asleep)
