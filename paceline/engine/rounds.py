"""Meet in rounds: everybody who has data pushes, the contributors (or the servers) divide the step among them.

Paces sync, and the rounds of local. The laws stand in ``protocol/rounds.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from paceline.engine.meeting import Push, Round
from paceline.engine.stepper import Stepper
from paceline.errors import ConfigError
from paceline.protocol.rounds import Closed, Waiting, close_round, reached
from paceline.transport.board import Board
from paceline.transport.lock import Lock
from paceline.transport.slots import ExchangeMemory, Spec


class Rounds:
    """A worker's side of the rounds of one exchange; ``stepper`` is its hands."""

    def __init__(
        self, spec: Spec, memory: ExchangeMemory, stepper: Stepper, board: Board, lock: Lock, rank: int
    ) -> None:
        self._memory, self._stepper, self._board, self._lock, self._rank = memory, stepper, board, lock, rank
        self._slot = memory.slots[rank]
        self._servers = tuple(range(spec.workers, spec.workers + spec.servers))

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
        self._slot.write(number, push.weight, push.loss, push.stop, push.steps)
        memory.pushed[self._rank] = number
        board.ring(self._rank)
        pushed = time.monotonic()
        if self._servers:
            board.wait(lambda: reached(number, memory.stepped, self._servers))
            contributors = tuple(w for w, slot in enumerate(memory.slots) if slot.pushed_in(number))
            closed = stepped = pushed  # all the time until the servers are done is waiting
        else:
            contributors = board.wait(lambda: close_round(number, memory.pushed, board)).contributors
            closed = time.monotonic()
            self._stepper.step(number, contributors, contributors.index(self._rank), len(contributors))
            memory.stepped[self._rank] = number
            board.ring(self._rank)
            stepped = time.monotonic()
            board.wait(lambda: reached(number, memory.stepped, contributors))
        return Round(number, contributors, (closed - pushed) + (time.monotonic() - stepped))

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
        number, round_ = max(memory.answered) + 1, self.number + 1
        self._slot.chosen[:] = chosen
        self._slot.write_weight(round_, weight)
        memory.asked[self._rank] = number
        board.ring(self._rank)
        contributors = board.wait(lambda: self._all_ask(number, round_)).contributors
        self._slot.write_norm(self._stepper.norm(round_, contributors, self._rank, order))
        memory.answered[self._rank] = number
        board.ring(self._rank)
        board.wait(lambda: reached(number, memory.answered, contributors))
        parts = [memory.slots[worker].norm for worker in contributors]
        return max(parts) if order == math.inf else sum(parts) ** (1.0 / order)

    def _all_ask(self, number: int, round_: int) -> Closed | Waiting:
        memory = self._memory
        for worker, pushed in enumerate(memory.pushed):
            if pushed >= round_ and memory.asked[worker] < number:
                raise ConfigError(
                    f"worker {self._rank} clips its gradients in round {round_}, worker {worker} does not",
                    why="the norm is that of all workers' gradient, so all must ask for it",
                    fix="call clip_grad_norm_ on every worker, or on none",
                )
        return close_round(number, memory.asked, self._board)

    def losses(self, number: int, contributors: tuple[int, ...]) -> tuple[float, float]:
        """Sums over the contributors of round ``number``, the last, of (loss x samples, samples)."""
        pairs = [self._memory.slots[worker].loss(number) for worker in contributors]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def count_steps(self, number: int, contributors: tuple[int, ...], before: int) -> int:
        """Local steps up to and with round ``number``: ``before`` it, and the most that any contributor took in it."""
        steps = before + max(self._memory.slots[worker].steps(number) for worker in contributors)
        self._memory.clocks[self._rank] = steps
        return steps

    def asked_to_stop(self, number: int, contributors: tuple[int, ...]) -> bool:
        return any(self._memory.slots[worker].stop(number) for worker in contributors)
