"""Meet in rounds: everybody who has data pushes, the contributors (or the servers) divide the step among them.

Paces sync, and the rounds of local. The laws stand in ``protocol/rounds.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from paceline.engine.exchange.meeting import Push, Round
from paceline.engine.exchange.stepper import Stepper
from paceline.errors import ConfigError
from paceline.protocol.hosts import asked_for, awaits, pushed_for
from paceline.protocol.rounds import (
    NEVER,
    NORMS,
    Abandoned,
    Closed,
    Rescue,
    Waiting,
    all_stepped,
    at_work,
    close_round,
    is_over,
    reached,
)
from paceline.transport.board import Board
from paceline.transport.lock import Lock
from paceline.transport.slots import ExchangeMemory, Spec

T = TypeVar("T")


class Rounds:
    """A worker's side of the rounds of one exchange; ``stepper`` is its hands."""

    def __init__(
        self, spec: Spec, memory: ExchangeMemory, stepper: Stepper, board: Board, lock: Lock, rank: int
    ) -> None:
        self._memory, self._stepper, self._board, self._lock, self._rank = memory, stepper, board, lock, rank
        self._slot = memory.slots[rank]
        # Called when a round has closed, with its number and contributors, whose slots are not written meanwhile.
        self.on_close: Callable[[int, tuple[int, ...]], None] = lambda number, contributors: None
        self._servers = tuple(range(spec.workers, spec.workers + spec.servers))
        # Pushes in place of this, where what those of a host bring is one (engine/elsewhere/host_push.py).
        self.bring: Callable[[int, float], None] | None = None
        self.ask: Callable[[int, float, int], None] | None = None  # likewise, for a norm of the round
        self.others: Callable[[], Iterable[Rounds]] = tuple  # those of the worker's other exchanges

    @property
    def number(self) -> int:
        """The last round this worker knows to be over."""
        return max(self._memory.stepped)

    def meet(self, push: Push) -> Round:
        """Push what is in the slot; returns when the parameters are those of the next version.

        Every worker that has data must come here for the round to close. Raises Aborted if the run is stopped
        while waiting.
        """
        board, memory = self._board, self._memory
        number = self.number + 1
        self._slot.write(number, push.weight, push.loss, push.stop, push.steps, push.place, board.crew, push.factor)
        if self.bring is not None:
            self.bring(number, push.weight)
        else:
            memory.pushed[self._rank] = number
            board.ring(self._rank)
        pushed = time.monotonic()
        if self._servers:
            board.wait(lambda: self._is_stepped(number))
            contributors = tuple(w for w in range(board.width) if memory.slots[w].pushed_in(number))
            closed = stepped = pushed  # all the time until the servers are done is waiting
        else:
            contributors = board.wait(lambda: self._close(number)).contributors
            closed = time.monotonic()
            self.on_close(number, contributors)
            self._stepper.step(number, contributors, contributors.index(self._rank), len(contributors))
            memory.stepped[self._rank] = number
            board.ring(self._rank)
            stepped = time.monotonic()
            self._await_steps(number, contributors)
        return Round(number, contributors, (closed - pushed) + (time.monotonic() - stepped))

    def _close(self, number: int) -> Closed | Waiting:
        memory = self._memory
        return close_round(number, memory.pushed, self._board, memory.since, memory.asked)

    def _await_steps(self, number: int, contributors: tuple[int, ...]) -> None:
        """Wait until all shares are stepped; do what is left of them for those who have died."""
        board, memory, rank = self._board, self._memory, self._rank
        while isinstance(
            answer := board.wait(lambda: all_stepped(number, memory.stepped, contributors, memory.since, rank)), Rescue
        ):
            self._stepper.step(number, contributors, contributors.index(answer.worker), len(contributors))
            memory.stepped[answer.worker] = number
            board.ring(rank)

    def bury(self, worker: int, deaths: int) -> None:
        """Under the run's lock: this worker has died so many times, and counts in no round until it has joined."""
        memory = self._memory
        if memory.attached[worker] < deaths:
            for column, last in ((memory.asked, asked_for), (memory.pushed, pushed_for)):
                number = last(worker, memory.offered, column, memory.slots)
                if number > column[worker]:
                    column[worker] = number
            memory.since[worker] = NEVER

    def finish_abandoned(self) -> None:
        """Under the run's lock: complete the last round if only the dead are in it."""
        answer = self._is_over(self._begun())
        if isinstance(answer, Abandoned):
            self._complete(self._begun(), answer.contributors)

    def is_in_round(self, worker: int) -> bool:
        """Has this worker, which has died, pushed a round that is not over, or asked a norm in it?"""
        number = self._come_to(worker)
        return number > 0 and self._is_over(number) is not True

    def _come_to(self, worker: int) -> int:
        """The last round that this worker was in."""
        return max(self._memory.pushed[worker], self._memory.asked[worker] // NORMS)

    def is_between_rounds(self) -> bool | Waiting:
        """Is the last round that has begun over? False where it is for others to complete: only the dead are in it."""
        answer = self._is_over(self._begun())
        return False if isinstance(answer, Abandoned) else answer

    def no_dead_in_round(self) -> bool | Waiting:
        """Are all rounds over that those who have died were in? True also where only they were: see ``_complete``."""
        for worker, since in enumerate(self._memory.since):
            number = self._come_to(worker) if since == NEVER else 0
            if number:
                answer = self._is_over(number)
                if isinstance(answer, Waiting):
                    return answer
        return True

    def _complete(self, number: int, contributors: tuple[int, ...]) -> None:
        """Under the run's lock: step a round in place of all who are in it."""
        memory = self._memory
        for share, worker in enumerate(contributors):
            if memory.stepped[worker] < number:
                self._stepper.step(number, contributors, share, len(contributors))
                memory.stepped[worker] = number
        # Servers first: who sees a worker's word pushes the next, which they must not take for two.
        for member in () if contributors else reversed(range(len(memory.stepped))):
            memory.stepped[member] = number

    def attach_again(self, deaths: int) -> None:
        """Under the run's lock: this process is the worker's next, after so many that have died."""
        self.bury(self._rank, deaths)
        self._memory.attached[self._rank] = deaths

    def join(self) -> None:
        """Count from a round that nobody has begun yet, and wait until the one before it is over."""
        board, memory, rank = self._board, self._memory, self._rank
        while True:
            first = self._begun() + 1
            memory.since[rank] = first
            board.ring(rank)
            if self._begun() < first:
                break
        while isinstance(board.wait(lambda: self._is_over(first - 1)), Abandoned):
            with self._lock:
                self.finish_abandoned()
            board.ring(rank)

    def _is_stepped(self, number: int) -> Closed | Waiting:
        """By servers, of whom the first tells how many they are. For contributors: that stays until they push again."""
        answer = reached(number, self._memory.stepped, self._servers[:1])
        return answer if isinstance(answer, Waiting) else reached(number, self._memory.stepped, self._at_work(number))

    def _at_work(self, number: int) -> Sequence[int]:
        return at_work(number, self._memory.stepped, self._servers, self._memory.crew)

    def _is_over(self, number: int) -> bool | Abandoned | Waiting:
        memory, servers = self._memory, self._at_work(number)
        while True:
            answer = is_over(number, memory.pushed, memory.stepped, servers, memory.since, memory.asked, self._board)
            before, servers = servers, self._at_work(number)
            if servers == before:
                return answer

    def _begun(self) -> int:
        """The last round that anybody has pushed, or asked a norm for."""
        return max(*self._memory.pushed, *(asked // NORMS for asked in self._memory.asked))

    def go_on_from(self, number: int) -> None:
        """Under the run's lock, before anybody has pushed: this was the last round of the run that is resumed."""
        memory = self._memory
        for worker in range(len(memory.pushed)):
            memory.pushed[worker] = number
        for member in range(len(memory.stepped)):
            memory.stepped[member] = number

    @property
    def is_whole(self) -> bool:
        """Were all workers that there are in the last round? Between hosts the next is then folded in shares."""
        slots = self._memory.slots
        return all(slots[worker].pushed_in(self.number) for worker in range(self._board.width))

    def were_whole(self) -> None:
        """Under the run's lock, before anybody has pushed: they were, in the run that is resumed."""
        for worker in range(self._board.width):
            self._memory.slots[worker].write_pushed_in(self.number)

    def load(self, loads: int, write: Callable[[], None]) -> None:
        """This worker has loaded its ``loads``-th checkpoint; ``write`` puts it in place of what all share, and is
        called if no other worker has done so. No round can close in the meantime: this worker has not pushed."""
        with self._lock:
            if loads > self._memory.loads[0]:
                write()
                self._memory.loads[0] = loads

    def refresh(self) -> None:
        """The shared parameters are the newest there are: nothing to ask for."""

    def norm(self, chosen: bytes, order: float, weight: float) -> float:
        """The norm of the gradient as it will be folded, over the parameters ``chosen`` here or on another worker.

        Every worker in the round must call it before it pushes, equally often. Raises ConfigError if one has not.
        """
        board, memory = self._board, self._memory
        round_ = self.number + 1
        number = max(memory.asked[self._rank], round_ * NORMS) + 1
        self._slot.chosen[:] = chosen
        self._slot.write_weight(round_, weight)
        self._slot.write_lies_in(round_, None)
        if self.ask is not None:
            self.ask(round_, weight, number)
        else:
            memory.asked[self._rank] = number
            board.ring(self._rank)
        contributors = board.wait(lambda: self._all_ask(number, round_)).contributors
        self._answer(number, round_, contributors, self._rank, order)
        while isinstance(
            answer := board.wait(
                lambda: all_stepped(number, memory.answered, contributors, memory.since, self._rank, round_)
            ),
            Rescue,
        ):
            self._answer(number, round_, contributors, answer.worker, order)
        parts = [memory.slots[worker].norm for worker in contributors]
        return max(parts) if order == math.inf else sum(parts) ** (1.0 / order)

    def _answer(self, number: int, round_: int, contributors: tuple[int, ...], worker: int, order: float) -> None:
        """Give a worker's part of the norm: this one's, or that of one that has died."""
        memory = self._memory
        memory.slots[worker].write_norm(self._stepper.norm(round_, contributors, worker, order))
        memory.answered[worker] = number
        self._board.ring(self._rank)

    def _all_ask(self, number: int, round_: int) -> Closed | Waiting:
        memory = self._memory
        for worker, pushed in enumerate(memory.pushed):
            if pushed >= round_ and memory.asked[worker] < number:
                raise not_asked(self._rank, worker, round_)
        return self.checked(close_round(number, memory.asked, self._board, memory.since, memory.asked, round_))

    def checked(self, answer: T) -> T:
        """What was answered to this worker, which asks for a norm. Raises ConfigError if the one that it is to wait for
        waits for this one, in a step or at a norm of another exchange."""
        if isinstance(answer, Waiting) and answer.on < len(self._memory.pushed):
            for other in self.others():
                if other.awaits(answer.on):
                    raise _chosen_otherwise(self._rank, answer.on)
        return answer

    def awaits(self, worker: int) -> bool:
        """Does that worker stand in the next round, or at a norm of it, until this one comes there?"""
        return awaits(worker, self._rank, self.number + 1, self._memory)

    def losses(self, number: int, contributors: tuple[int, ...]) -> tuple[float, float]:
        """Sums over the contributors of round ``number``, the last, of (loss x samples, samples)."""
        pairs = [self._memory.slots[worker].loss(number) for worker in contributors]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def count_steps(self, number: int, contributors: tuple[int, ...], before: int) -> int:
        """Local steps up to and with round ``number``: ``before`` it, and the most that any contributor took in it."""
        steps = before + max(self._memory.slots[worker].steps(number) for worker in contributors)
        self._memory.clocks[self._rank] = steps
        return steps

    def counts(self, worker: int, number: int) -> bool:
        """Does the process that is this worker now count in round ``number``, if it is there?"""
        return self._memory.since[worker] <= number

    def asked_to_stop(self, number: int, contributors: tuple[int, ...]) -> bool:
        return any(self._memory.slots[worker].stop(number) for worker in contributors)


def not_asked(rank: int, other: int, number: int) -> ConfigError:
    """What worker ``rank`` raises that asks for a norm in a round that the ``other`` has come to without."""
    return ConfigError(
        f"worker {rank} clips its gradients in round {number}, worker {other} does not",
        why="the norm is that of all workers' gradient, so all must ask for it",
        fix="call clip_grad_norm_ on every worker, or on none; over the same parameters, with a gradient or without",
    )


def _chosen_otherwise(rank: int, other: int) -> ConfigError:
    return ConfigError(
        f"worker {rank} clips gradients of an optimizer that worker {other} leaves out",
        why=f"worker {other} waits for it in another optimizer's step or norm, so both would wait for ever",
        fix="call clip_grad_norm_ over the same parameters on every worker, with a gradient or without",
    )
