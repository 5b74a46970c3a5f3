"""Where a run stands, kept up to date at thousands of records a second. Pure: no clock and no screen.

Rounds are added to running sums; rates are worked out only when someone looks, from the sums at
earlier looks. Times are the records' own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.config import Job
from paceline.events import Epoch, Metric, is_behind

WINDOW_S = 8.0  # rates are means over the last so many seconds
WARM_UP_ROUNDS = 5  # memory is touched for the first time, code is compiled
KEEP_LOSS = 0.95  # the shown loss remembers about 20 rounds


@dataclass(frozen=True)
class Standing:
    """One look: ``done`` of ``total`` steps of the stretch that ``label`` names (total None: unknown)."""

    label: str
    done: int
    total: int | None
    loss: float | None
    samples_per_s: float
    bytes_sent: int
    left_s: float | None
    values: Mapping[str, float | None] = field(default_factory=dict)  # what else was logged, as it was last

    @property
    def share(self) -> float | None:
        return None if self.total is None else min(1.0, self.done / max(self.total, 1))


class Progress:
    """Fed with a job's Epoch and Metric records in their order."""

    def __init__(self, job: Job) -> None:
        self._epochs, self._last_step = job.epochs, job.steps
        self._epoch, self._done = 1, 0
        self._epoch_steps: int | None = None
        self._time_s, self._step, self._samples, self._bytes = 0.0, 0, 0, 0
        self._loss, self._weight = 0.0, 0.0
        self._first_s, self._steady_samples = 0.0, 0
        self._rounds, self._round_s, self._overhead_s = 0, 0.0, 0.0
        self._values: dict[str, float | None] = {}
        self._looks: deque[tuple[float, int, int]] = deque()  # (time, samples, steps) at earlier looks

    def epoch_begins(self, record: Epoch) -> None:
        self._epoch, self._epoch_steps, self._done = record.epoch, record.steps, 0

    def add(self, metric: Metric) -> None:
        self._values |= metric.values
        if metric.loss is not None:
            self._loss = KEEP_LOSS * self._loss + (1 - KEEP_LOSS) * metric.loss
            self._weight = KEEP_LOSS * self._weight + (1 - KEEP_LOSS)
        if is_behind(metric):
            return
        self._done += metric.step - self._step  # more than one at pace local
        self._time_s, self._step = metric.time_s, metric.step
        self._samples += metric.samples
        self._bytes += metric.bytes_sent
        self._rounds += 1
        if self._rounds <= WARM_UP_ROUNDS:
            self._first_s = metric.time_s
        else:
            self._steady_samples += metric.samples
        self._overhead_s += metric.waiting_s + metric.exchanging_s
        self._round_s += metric.computing_s + metric.waiting_s + metric.exchanging_s
        if not self._looks:
            self._looks.append((self._time_s, self._samples, self._step))

    def look(self) -> Standing:
        """The standing now; it also becomes a point that later rates are counted from."""
        begun_s, samples, steps = self._looks[0] if self._looks else (0.0, 0, 0)
        seconds = self._time_s - begun_s
        samples_per_s = (self._samples - samples) / seconds if seconds > 0 else 0.0
        steps_per_s = (self._step - steps) / seconds if seconds > 0 else 0.0
        label, done, total = self._stretch()
        left = None if total is None or steps_per_s <= 0 else max(total - done, 0) / steps_per_s
        self._looks.append((self._time_s, self._samples, self._step))
        while len(self._looks) > 2 and self._time_s - self._looks[1][0] > WINDOW_S:
            self._looks.popleft()
        loss = self._loss / self._weight if self._weight else None
        return Standing(label, done, total, loss, samples_per_s, self._bytes, left, self._values)

    @property
    def steady_samples_per_s(self) -> float | None:
        """Over all rounds but the first few; None while there are no more than those."""
        seconds = self._time_s - self._first_s
        return self._steady_samples / seconds if self._steady_samples and seconds > 0 else None

    @property
    def overhead(self) -> float:
        """The share of the workers' time, 0 to 1, that was waiting and exchanging."""
        return self._overhead_s / self._round_s if self._round_s > 0 else 0.0

    def _stretch(self) -> tuple[str, int, int | None]:
        """What the bar is a bar of: this epoch, or all steps where the loader's length is unknown."""
        if self._epoch_steps is None and self._last_step is not None:
            return "steps", self._step, self._last_step
        label = f"epoch {self._epoch}" + (f"/{self._epochs}" if self._epochs is not None else "")
        total = self._epoch_steps
        if total is not None and self._last_step is not None:
            total = min(total, self._done + max(self._last_step - self._step, 0))
        return label, self._done, total
