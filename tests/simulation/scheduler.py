"""Who has the next turn: processes as threads of which one runs at a time, chosen by a seeded random source.

A turn is one read or write of shared memory. Whatever runs between two turns is the real code of paceline, so a
schedule is any interleaving of the single words that its processes read and write. A process sleeps on a word as on a
futex, without a timeout: a wake-up that is lost is a deadlock here. It can be killed at any turn; it then stays where
it is until the schedule is over, when its thread is ended, and nothing that it does on its way out is seen by others.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

TURNS = 150_000  # far more than any schedule needs: one that takes them all goes round in circles
_NAPS, _NAP = 0.02, 400  # how often who had a turn gets none for a while; how many turns, on average


class Killed(BaseException):
    """Raised in the thread of a process that has been killed."""


class Stuck(AssertionError):
    """Nobody can go on, or nobody gets anywhere."""


class Task:
    """A process of the simulated host."""

    def __init__(self, name: str, body: Callable[[], None], weight: int) -> None:
        self.name, self.body, self.weight = name, body, weight
        self.asleep_on: Hashable = None
        self.killed = self.ended = False
        self.naps_until = 0  # turns
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return self.name


class Scheduler:
    """Runs tasks to their ends. ``on_idle`` is asked to wake somebody when all are asleep. ``naps``: now and then who
    has just had a turn gets none for a while, between two words that it reads perhaps, as long as others can go on."""

    def __init__(
        self,
        random_: random.Random,
        trace: Callable[[str], None] | None = None,
        naps: random.Random | None = None,
    ) -> None:
        self.random, self.trace, self._naps = random_, trace, naps
        self.current: Task | None = None
        self.turns = 0
        self.failure: BaseException | None = None
        self.on_idle: Callable[[], bool] = lambda: False
        self.on_kill: Callable[[], None] = lambda: None
        self.next_kill = TURNS + 1
        self._ready: list[Task] = []
        self._tasks: list[Task] = []
        self._stopping = False
        self._main = threading.Lock()
        self._main.acquire()
        # Fair schedules; and ones in which a task goes on alone until its luck turns.
        self._luck = random_.choice((1.0, 0.3, 0.1, 0.1, 0.02))
        self._next_switch = 1
        self._next_event = 1
        self._lock_holder: Task | None = None

    def start(self, name: str, body: Callable[[], None], weight: int = 1) -> Task:
        task = Task(name, body, weight)
        task.thread = threading.Thread(target=self._live, args=(task,), name=name, daemon=True)
        self._tasks.append(task)
        self._ready.append(task)
        task.thread.start()
        return task

    def run(self) -> None:
        """Run all tasks, also those that are started on the way. Raises what one of them raised, or Stuck."""
        self._pass_on()
        self._main.acquire()
        self._stopping = True
        for task in self._tasks:
            assert task.thread is not None
            if not task.ended:
                task.killed = True
                self.current = task
                task.baton.release()
            task.thread.join()
        if self.failure is not None:
            raise self.failure

    # --- what a task calls ---

    def turn(self, *, alone: bool = False) -> None:
        """Before a word of shared memory is read or written. ``alone``: only the lock's holder sees it, so that it
        makes no difference who comes next."""
        task = self.current
        assert task is not None
        if task.killed:
            raise Killed
        self.turns += 1
        if self.turns >= self._next_event:
            self._event(task, alone)

    def sleep(self, on: Hashable) -> None:
        task = self.current
        assert task is not None
        if task.killed:
            raise Killed
        task.asleep_on = on
        self._ready.remove(task)
        self._pass_on()
        self._wait_for_baton(task)

    def wake(self, on: Hashable) -> None:
        for task in self._tasks:
            if task.asleep_on == on and not task.killed:
                self.rouse(task)

    def rouse(self, task: Task) -> None:
        if task.asleep_on is not None:
            task.asleep_on = None
            self._ready.append(task)

    def take_lock(self) -> None:
        self.turn()
        while self._lock_holder is not None:
            self.sleep("lock")
        self._lock_holder = self.current

    def try_lock(self) -> bool:
        self.turn()
        if self._lock_holder is not None:
            return False
        self._lock_holder = self.current
        return True

    def give_lock(self) -> None:
        self.turn()
        assert self._lock_holder is self.current
        self._lock_holder = None
        self.wake("lock")

    # --- what goes on behind their backs ---

    def kill(self, victim: Task) -> None:
        """The kernel lets go of the victim's lock; what it has left undone stays as it is."""
        victim.killed = True
        if victim in self._ready:
            self._ready.remove(victim)
        if self._lock_holder is victim:
            self._lock_holder = None
            self.wake("lock")

    def holds_lock(self, task: Task) -> bool:
        return self._lock_holder is task

    @property
    def asleep(self) -> list[Task]:
        return [task for task in self._tasks if task.asleep_on is not None and not task.killed]

    def _event(self, task: Task, alone: bool) -> None:
        if self.turns > TURNS:
            raise Stuck(f"no end after {TURNS} turns")
        if self.turns >= self.next_kill:
            self.next_kill = TURNS + 1
            self.on_kill()
            if task.killed:
                raise Killed
        if self.turns >= self._next_switch:
            if alone:
                return
            self._next_switch = self.turns + self._gap()
            if self._naps is not None and self._naps.random() < _NAPS:
                task.naps_until = self.turns + int(self._naps.expovariate(1 / _NAP))
            other = self._choose()
            if other is not task:
                self._hand_over(other)
                self._wait_for_baton(task)
        self._next_event = min(self._next_switch, self.next_kill, TURNS + 1)

    def look_out(self) -> None:
        """``next_kill`` has changed."""
        self._next_event = min(self._next_switch, self.next_kill, TURNS + 1)

    def _gap(self) -> int:
        return 1 if self._luck == 1.0 else 1 + int(self.random.expovariate(self._luck))

    def _choose(self) -> Task:
        ready = self._ready
        if self._naps is not None:
            ready = [task for task in ready if task.naps_until <= self.turns] or ready
        if len(ready) == 1:
            return ready[0]
        drawn = self.random.random() * sum(task.weight for task in ready)
        for task in ready:
            drawn -= task.weight
            if drawn < 0:
                return task
        return ready[-1]

    def _hand_over(self, to: Task) -> None:
        self.current = to
        to.baton.release()

    def _wait_for_baton(self, task: Task) -> None:
        task.baton.acquire()
        if task.killed:
            raise Killed

    def _pass_on(self) -> None:
        """The current task cannot go on: another does, or the schedule is over."""
        if self.failure is None and not self._ready and not self.on_idle() and self.asleep:
            told = "; ".join(f"{task} sleeps on {task.asleep_on}" for task in self.asleep)
            self.failure = Stuck(f"deadlock: {told}")
        if self.failure is not None or not self._ready:
            self._main.release()
        else:
            self._hand_over(self._choose())

    def _live(self, task: Task) -> None:
        task.baton.acquire()
        try:
            if not task.killed:
                task.body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001  the outermost line of a thread that stands for a process
            if not self._stopping:
                self.failure = self.failure or error
        task.ended = True
        if self._stopping:
            return
        if task in self._ready:
            self._ready.remove(task)
        if self._lock_holder is task and self.failure is None:
            self.failure = AssertionError(f"{task} has ended with the lock")
        self._pass_on()


@contextmanager
def on_one_core() -> Iterator[None]:
    """Threads that are started meanwhile stay on the core that this one is on. They take turns, and a turn is handed
    over twice as fast within one core."""
    before = os.sched_getaffinity(0)
    fields = Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()
    os.sched_setaffinity(0, {int(fields[36])})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
