"""A worker's side of an optimizer's exchange: what happens inside ``optimizer.step()``.

    gradient, or H local steps -> own slot -> a meeting (in rounds, or through the log) -> newest parameters

The pace is three choices: what is brought (``inner.py``: a gradient, or the outcome of local steps), when and with whom
it is applied (``rounds.py``, ``arrivals.py``), and whose optimizer applies it (the user's; at ``local`` an outer SGD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn, optim

from paceline.config import Async, Local, Pace, Quorum
from paceline.engine.context import Context
from paceline.engine.exchange.applier import Applier
from paceline.engine.exchange.arrivals import Arrivals, Close
from paceline.engine.exchange.inner import Inner
from paceline.engine.exchange.meeting import Push, Round
from paceline.engine.exchange.replica import Replica
from paceline.engine.exchange.rounds import Rounds
from paceline.engine.exchange.shards import VOID, Shards
from paceline.engine.exchange.spec import describe, sends_gradients
from paceline.engine.exchange.stepper import Stepper
from paceline.params import optimizers
from paceline.protocol.log import Entry
from paceline.protocol.ranges import elsewhere, fetch_word
from paceline.protocol.rounds import Waiting
from paceline.transport.board import Aborted
from paceline.transport.slots import ExchangeMemory

_LOOK_S = 0.1  # how often who waits for a server on another host looks whether the run is being stopped


class Exchange:
    """One wrapped optimizer. ``spec`` is made before the memory exists; ``attach`` completes it."""

    # Which parameters have a gradient, where that is on another host, finite, and the meeting is to get it.
    offered: bytes | None = None
    factor: float | None = None  # that of the next push, see ``Slot.factor``

    def __init__(
        self,
        optimizer: optim.Optimizer,
        names: dict[int, str],
        with_rows: set[int],
        context: Context,
        *,
        share: bool,
        pace: Pace,
    ) -> None:
        job = context.job
        optimizers.check(optimizer, servers=job.servers)
        self.parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self.optimizer = optimizer
        self._context, self._pace, self._share = context, pace, share
        self.spec, self._stepped_by = describe(optimizer, names, with_rows, job, pace)
        self.inner: Inner | None = None
        self.was_finite = True  # the gradient that was brought last
        self._loads = 0

    @property
    def number(self) -> int:
        """The last round, or version, that this worker knows of."""
        return self._meeting.number

    @property
    def memory(self) -> ExchangeMemory:
        """Where all of it lies."""
        return self._memory

    @property
    def in_rounds(self) -> Rounds | None:
        """The rounds, where the pace has them."""
        return self._meeting if isinstance(self._meeting, Rounds) else None

    @property
    def taken(self) -> int:
        """The last entry of the log whose copy this worker has; at rounds the last round."""
        return self._arrivals.taken if self.spec.parts else self.number

    @property
    def in_period(self) -> bool:
        """Are there local steps that have not been brought to a meeting?"""
        return self.inner is not None and self.inner.steps > 0

    def attach(self, memory: ExchangeMemory, segment: int, close: Close) -> None:
        """Take the memory into use; worker 0 must call ``publish`` before anyone calls ``adopt``."""
        context, spec, pace = self._context, self.spec, self._pace
        self._memory = memory
        assert context.lock.journal is not None
        memory.keep_journal(context.lock.journal, segment)
        views = self._share and not isinstance(pace, Local)
        self._replica = Replica(self.optimizer, spec, memory, context.rank, views=views)
        stepped_by = self._stepped_by
        shards = Shards(spec, memory, type(stepped_by), vars(stepped_by))
        self._stepper = Stepper(shards, memory)
        if spec.parts:
            self._arrivals = Arrivals(spec, memory, pace, context.board, context.lock, context.rank, close)
            if not spec.servers:
                self._arrivals.applier = Applier(spec, shards, memory)
            self._meeting: Rounds | Arrivals = self._arrivals
        else:
            self._meeting = Rounds(spec, memory, self._stepper, context.board, context.lock, context.rank)
        deaths = context.board.deaths
        if any(deaths):
            with context.lock:
                for worker, count in enumerate(deaths):
                    self._meeting.bury(worker, count)
                if deaths[context.rank]:
                    self._meeting.attach_again(deaths[context.rank])
        self.inner = make_inner(self._replica, pace)

    def know(self, exchanges: Sequence[Exchange]) -> None:
        """Of all of this worker, also of those to come, where there are rounds."""
        rounds = self.in_rounds
        if rounds is not None:
            rounds.others = lambda: [o.in_rounds for o in exchanges if o is not self and o.in_rounds is not None]

    # --- checkpoints ---

    def shared_names(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the parameters."""
        return [(entry.name, tuple(entry.shape)) for entry in self.spec.table.entries]

    def shared_values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The shared parameters, by name; aliases."""
        yield from zip((entry.name for entry in self.spec.table.entries), self._replica.shared, strict=True)

    def shared_state(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The state of the optimizer that steps them, by name and key; aliases."""
        for index, entry in enumerate(self.spec.table.entries):
            yield entry.name, self._memory.state.view(index)

    def newest(self) -> dict[str, torch.Tensor]:
        """The flat vectors in which this worker's newest parameters lie; aliases."""
        return self._memory.params | self._memory.slots[self._context.rank].copy

    def fill(self, values: Sequence[torch.Tensor], states: Sequence[dict[str, torch.Tensor]]) -> None:
        """Worker 0, before the memory is there: begin with these parameters and this state."""
        with torch.no_grad():
            for parameter, value, state in zip(self.parameters, values, states, strict=True):
                parameter.copy_(value)
                if state:
                    self._stepped_by.state[parameter] = dict(state)

    def numbers(self) -> dict[str, int]:
        """How far the exchange has come, whatever the pace and the number of workers."""
        return {
            "number": self.number // self._pushes_a_step,
            "loads": self._memory.loads[0],
            "steps": max(self._memory.clocks, default=0),
            "whole": self.in_rounds is None or self.in_rounds.is_whole,
        }

    @property
    def _pushes_a_step(self) -> int:
        """Versions count the pushes of all."""
        return self._context.job.workers if self.spec.parts and not isinstance(self._pace, Quorum) else 1

    def go_on_from(self, numbers: dict[str, int]) -> None:
        """Worker 0, before anybody has pushed: the run goes on from here."""
        with self._context.lock:
            self._memory.loads[0] = numbers["loads"]
            for worker in range(len(self._memory.clocks)):
                self._memory.clocks[worker] = numbers["steps"]
            self._meeting.go_on_from(numbers["number"] * self._pushes_a_step)
            if self.in_rounds is not None and numbers.get("whole", True):
                self.in_rounds.were_whole()

    def save(self, entry: Entry | None, copy: Callable[[], None]) -> None:
        """Call ``copy`` while nobody steps the parameters: in turn ``entry`` of the log, or between two rounds, where
        who is in the next has this worker to wait for."""

        def of_all() -> None:
            with self._context.lock:
                self.bring_home()
            copy()

        self._replica.wait_for_device()
        if entry is None:
            of_all()
        else:
            self._arrivals.save(entry, of_all)

    def bring_home(self, *, parameters: bool = True, state: bool = True) -> None:
        """Under the run's lock, while nobody steps: have in home's memory what servers on other hosts have. Raises
        Aborted."""
        memory, board = self._memory, self._context.board
        away = elsewhere(self.spec.servers, self.spec.hosts)
        if not away:
            return
        memory.fetched[0] = number = fetch_word(memory.fetched[0], parameters=parameters, state=state)
        board.wake_all()  # servers sleep on whoever is to push
        for server in away:
            while (seen := memory.fetched[1 + server]) < number:
                if board.abort:
                    raise Aborted(f"server {server} has not sent what it has")
                memory.await_word(memory.fetched, 1 + server, seen, _LOOK_S)

    def append_save(self) -> Entry | None:
        """Under the run's lock: what was appended so far is in the checkpoint. None at rounds."""
        return self._arrivals.append_save() if self.spec.parts else None

    def place_in(self, worker: int, number: int) -> tuple[int, int]:
        """How far into its data a worker was with its last push up to round ``number``, which is over."""
        return self._memory.slots[worker].place(min(self._memory.pushed[worker], number))

    @property
    def settings(self) -> list[optimizers.Group]:
        """The hyper-parameters of the user's optimizer, as plain values."""
        return optimizers.settings(self.optimizer)

    def load_settings(self, groups: Sequence[optimizers.Group]) -> None:
        """Set those that the optimizer has."""
        optimizers.load_settings(self.optimizer, groups)

    def own_state(self) -> dict[int, dict[str, Any]]:
        """The state of this worker's own copy of the optimizer, where it takes local steps; by parameter."""
        if self.inner is None:
            return {}
        state = self.optimizer.state
        return {index: dict(state[p]) for index, p in enumerate(self.parameters) if p in state}

    def load_own_state(self, state: dict[int, dict[str, Any]]) -> None:
        for index, values in state.items() if self.inner is not None else ():
            self.optimizer.state[self.parameters[index]] = values

    def publish(self) -> None:
        """Worker 0: fill the memory with its parameters and its optimizer's state."""
        self._replica.publish_parameters()
        self._replica.publish_state(self._stepped_by)

    def adopt(self) -> None:
        """Everyone: take the published parameters; from now on they lie in the shared memory."""
        self._meeting.refresh()
        self._replica.adopt()
        if self._stepped_by is self.optimizer and self.inner is None:
            self.optimizer.state.clear()
            self.optimizer.register_state_dict_pre_hook(lambda _: self._replica.show_state())

    def step(self, push: Push) -> Round | None:
        """Bring a gradient and meet; None within a period of local steps. The parameters may be computed on then.

        A gradient that is not finite is dropped (``was_finite``): its push, or local step, is void.
        """
        self._replica.check_unchanged()
        self.was_finite = True
        if self.offered is not None:
            self._replica.write_mask(self.offered)
        elif push.weight >= 0:
            inner = self.inner is not None
            self.was_finite = self._replica.has_finite_gradients() if inner else self._replica.write_gradients()
            if not self.was_finite:
                push = replace(push, weight=VOID)
        if self.factor is not None:
            push = replace(push, factor=self.factor)
        if self.inner is None:
            return self._meet(push)
        return self._meet(self.inner.close()) if self.inner.step(push) else None

    @property
    def not_finite(self) -> str:
        """Where, in words, the gradient that was brought last is not finite."""
        return self._replica.not_finite()

    def flush(self) -> Round | None:
        """Close a period of local steps early, at the end of the data; None if there is none open."""
        if self.inner is None or not self.in_period:
            return None
        return self._meet(self.inner.close())

    def _meet(self, push: Push) -> Round:
        self._replica.write_settings(self._stepped_by)
        round_ = self._meeting.meet(push)
        self._replica.pull()
        return round_

    def push(self) -> None:
        """Bring a gradient and go on, without the newest parameters; waits for the push before this one."""
        self.finish()
        self._replica.write_gradients()
        self._replica.write_settings(self._stepped_by)
        self._arrivals.push()

    def finish(self) -> None:
        """Wait until this worker's last push is applied."""
        self._arrivals.finish()

    def refresh(self) -> None:
        """Take the newest parameters, if this worker does not look at them anyway. Not within a period."""
        self._replica.wait_for_device()  # a pull that is still queued reads what is about to be written
        self._meeting.refresh()
        self._replica.pull()

    def pull(self, place: int) -> None:
        """As ``refresh``; at least of this parameter."""
        self.refresh()

    def bury(self, worker: int, deaths: int) -> None:
        """Under the run's lock: this worker has died so many times."""
        self._meeting.bury(worker, deaths)

    def finish_abandoned(self) -> None:
        """Under the run's lock: do what only the dead had in hand."""
        self._meeting.finish_abandoned()

    def is_in_round(self, worker: int) -> bool:
        """Under the run's lock: was this worker, which has died, in a round that is not over?"""
        rounds = self.in_rounds
        return rounds is not None and rounds.is_in_round(worker)

    def is_between_rounds(self) -> bool | Waiting:
        """Is nobody in a round? False also where only the dead are, and it is to be completed."""
        rounds = self.in_rounds
        return True if rounds is None else rounds.is_between_rounds()

    def no_dead_in_round(self) -> bool | Waiting:
        """Are all rounds over that those who have died were in?"""
        rounds = self.in_rounds
        return True if rounds is None else rounds.no_dead_in_round()

    def join(self) -> None:
        """A newcomer takes part from here on, with the newest parameters."""
        self._replica.wait_for_device()
        self._meeting.join()
        self._replica.pull()

    def await_slower(self) -> None:
        """A newcomer has the clock of the worker before it, which may be ahead of the others'."""
        if self.spec.parts:
            self._arrivals.await_slower()
            self._replica.pull()

    def place(self, worker: int) -> tuple[int, int]:
        """How far into its data a worker was with its last push; see ``Worker._settle_place``."""
        return self._memory.slots[worker].place(self._memory.pushed[worker])

    def level(self) -> None:
        """Under the run's lock, at the end of a pass: the next one begins with equal clocks."""
        if self.spec.parts:
            self._arrivals.level()

    def catch_up(self) -> None:
        """Come back from a wait in which the others have trained on."""
        if self.spec.parts:
            self._arrivals.catch_up()

    def _is_shared(self, *, state: bool) -> bool:
        """Of all workers? The ``state`` is not where they take local steps, each by its own optimizer."""
        return not state or self._stepped_by is self.optimizer

    def may_load_first(self, *, state: bool) -> bool:
        """May nobody else have loaded yet what the script is just loading?"""
        return self._is_shared(state=state) and self._loads >= self._memory.loads[0]

    def load(self, *, parameters: bool, state: bool) -> None:
        """Put what the script has just loaded into this worker's model or optimizer in place of what all share.

        All workers load the same, each when it comes to it: the first one's is taken.
        """
        if not self._is_shared(state=state):
            return

        def write() -> None:
            # What is not loaded stays as it is; the rest may be here already.
            with self._context.lock if self.spec.parts else nullcontext():
                self.bring_home(parameters=not parameters, state=not state)
            if parameters:
                self._replica.publish_parameters()
            if state:
                self._replica.publish_state(self.optimizer)

        self._loads += 1
        self._meeting.load(self._loads, write)
        self._replica.pull()
        if state and self.inner is None:
            self.optimizer.state.clear()

    @property
    def most_steps(self) -> int:
        """Local steps up to the last round (pace local)."""
        return max(self._memory.clocks)

    def told(self, members: Sequence[int]) -> list[tuple[float, float, int]]:
        """(sum of loss x samples, samples, steps) that came with the members' last pushes."""
        slots, pushed = self._memory.slots, self._memory.pushed
        return [(*slots[w].loss(pushed[w]), slots[w].steps(pushed[w])) for w in members]

    def clipped(self, factor: torch.Tensor) -> None:
        """The script's gradients have been multiplied by this: the step reads them as they are then."""

    def norm(self, chosen: bytes, order: float, weight: float) -> float:
        """The norm of all workers' gradient; see ``Rounds.norm``. For pace sync only."""
        rounds = self.in_rounds
        assert rounds is not None, "there is a norm of all only where all meet"
        if self.offered is not None:
            self._replica.write_mask(self.offered)
        elif not self._replica.write_gradients():
            weight = VOID  # it will be dropped: the others' norm is without it
        return rounds.norm(chosen, order, weight)


def make_inner(replica: Replica, pace: Pace) -> Inner | None:
    """The local steps of a pace that has them."""
    if sends_gradients(pace):
        return None
    assert isinstance(pace, Local | Async)
    return Inner(replica, pace.every, sums=isinstance(pace, Async))
