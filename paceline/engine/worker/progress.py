"""How far a worker is: samples, steps, losses, and what of them the launcher has not been told yet."""

from __future__ import annotations

import time
from collections.abc import Sequence

from paceline.config import Local, Quorum, Sync
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.meeting import Round
from paceline.engine.launcher.metrics import Row
from paceline.engine.worker.weights import Weights
from paceline.protocol import messages
from paceline.transport.board import Aborted
from paceline.transport.channel import Closed

_FLUSH_S = 0.2


class Progress:
    """``look`` is what goes to the stop rules: sums of loss x samples, and of samples, of steps not told yet."""

    def __init__(self, context: Context, exchanges: Sequence[Exchange]) -> None:
        self._channel, self._exchanges, self._pace = context.channel, exchanges, context.job.pace
        self._board, self._rank = context.board, context.rank
        self.in_rounds = isinstance(self._pace, Sync | Local)
        # How many rounds, or versions of the log, a step of all is. It stands for as many samples after workers have
        # come or left.
        self.workers = context.job.workers
        self.pushes_a_step = 1 if self.in_rounds or isinstance(self._pace, Quorum) else self.workers
        self.weights = Weights()
        self.batches = 0  # drawn so far
        self.samples_before: dict[int, int] = {}  # loader -> samples when its pass in progress began
        self.batch_samples = 1
        self.own_steps = 0
        self.steps = 0  # pace local: steps in the rounds behind this worker
        self.passes = 0  # that were trained on, by all
        self.epoch = 0
        self.behind: tuple[int, int] | None = None  # the epoch that is over, and this worker's samples in it
        self.look = (0.0, 0.0)
        self.batch_stepped = self.batch_dropped = False
        self.row = Row()
        self._unstepped = (0.0, 0.0)  # as `look`, of what was logged since the last step
        self._rows = bytearray()
        self._flushed_s = self._step_done_s = time.monotonic()
        self._longest_s = 0.0  # from one step to the next

    @property
    def step_number(self) -> int:
        """Rounds, or pushes of all divided by the number of workers at the start, or local steps."""
        if not self._exchanges:
            return 0
        first = self._exchanges[0]
        if isinstance(self._pace, Local) and first.inner is not None:
            return self.steps + first.inner.steps
        return first.number // self.pushes_a_step

    # --- what happens in the loop ---

    @property
    def samples(self) -> int:
        """Read so far, evaluations excepted."""
        return self.weights.samples

    def drawn(self, loader: int, samples: int) -> None:
        """A batch goes to the script."""
        self.close_row()
        self.batches += 1
        self.batch_stepped = self.batch_dropped = False
        self.weights.drawn(loader, samples)
        self.batch_samples = samples
        if self.own_steps:  # the first step of a process may have to compile what it computes
            self._board.in_hand[self._rank] = self.batches

    def put_down(self) -> None:
        """The script has done with the batch in hand."""
        self._board.in_hand[self._rank] = 0

    def log_loss(self, loss: float) -> None:
        """Of the batch in hand."""
        self._unstepped = _added(self._unstepped, (loss * self.batch_samples, self.batch_samples))
        if self.batch_stepped:
            self.take_in_losses()

    def log_behind(self, loss: float | None, values: dict[str, float]) -> None:
        """Of the epoch that is over."""
        assert self.behind is not None
        self.flush()
        epoch, samples = self.behind
        self._channel.send(messages.LoggedBehind(epoch, loss, max(samples, 1), values))
        if loss is not None and self.batch_stepped:  # of training, for the stop rules
            self.look = _added(self.look, (loss * self.batch_samples, self.batch_samples))

    def forget_losses(self) -> None:
        """What was logged since the last step is an evaluation's, not training's."""
        self._unstepped = (0.0, 0.0)

    def take_in_losses(self) -> None:
        """What was logged belongs to a step that is taken, or just being taken."""
        self.row.loss_sum += self._unstepped[0]
        self.row.loss_samples += self._unstepped[1]
        self.look = _added(self.look, self._unstepped)
        self._unstepped = (0.0, 0.0)
        self.batch_stepped = True

    def forget_step(self) -> None:
        """Training was over before the push."""
        self.row = Row()

    def drop_step(self) -> None:
        """The push came too late for its round: it counts for nothing, and its samples come again."""
        row = self.row
        self.row = Row(
            dropped=row.dropped + 1,
            computing_s=row.computing_s,
            waiting_s=row.waiting_s,
            exchanging_s=row.exchanging_s,
            time_s=row.time_s,
        )
        self.batch_dropped = True

    def count_step(self, round_: Round) -> None:
        """A push of the first exchange counts."""
        row = self.row
        row.stepped, row.epoch, row.staleness = True, self.epoch, round_.staleness
        row.key = -(-round_.number // self.pushes_a_step)
        row.contributors = len(round_.contributors) if self.pushes_a_step == 1 else self.pushes_a_step

    # --- time ---

    def begin_step(self) -> None:
        """What has passed since the last step was computing."""
        now = time.monotonic()
        computing_s = now - self._step_done_s
        self.row.computing_s += computing_s
        self._step_done_s = now
        if computing_s > self._longest_s:
            self._longest_s, self._board.longest_ns[self._rank] = computing_s, int(computing_s * 1e9)

    def end_step(self, round_: Round | None) -> None:
        row, now = self.row, time.monotonic()
        waited = round_.waiting_s if round_ is not None else 0.0
        row.waiting_s += waited
        row.exchanging_s += now - self._step_done_s - waited
        self._step_done_s = row.time_s = now

    def waited_since(self, begun: float) -> None:
        self.row.waiting_s += time.monotonic() - begun
        self.start_clock()

    def start_clock(self) -> None:
        """From here on it is computing."""
        self._step_done_s = time.monotonic()

    # --- telling the launcher ---

    def close_row(self) -> None:
        """What comes now belongs to the next step."""
        if self.row.stepped:
            self._rows += self.row.pack()
            self.row = Row()

    def flush_now_and_then(self) -> None:
        if self.row.time_s - self._flushed_s > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send the launcher what it has not seen of the steps behind this worker."""
        if self._rows:
            try:
                self._channel.send(messages.Steps(bytes(self._rows)))
            except Closed:
                raise Aborted("the launcher is gone") from None
            self._rows.clear()
        self._flushed_s = time.monotonic()


def _added(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]
