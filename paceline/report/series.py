"""metrics.jsonl as a short series: a file of any length becomes at most a few thousand bins.

Reads a line at a time and keeps ``2 * most`` bins at most: when they are full, neighbours are merged and
every later bin takes twice the rounds. So the memory is bounded and no round is left out of the means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from paceline.events import Metric, is_behind

MOST_BINS = 1500  # a picture 1500 pixels wide shows no more


@dataclass(slots=True)
class Bin:
    """Sums over ``rounds`` rounds in a row; ``losses`` of them had a loss, from ``low`` to ``high``."""

    step: int
    rounds: int = 0
    losses: int = 0
    loss_sum: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    computing_s: float = 0.0
    waiting_s: float = 0.0
    exchanging_s: float = 0.0

    def add(self, metric: Metric) -> None:
        self.step = metric.step
        self.rounds += 1
        self.computing_s += metric.computing_s
        self.waiting_s += metric.waiting_s
        self.exchanging_s += metric.exchanging_s
        self.add_loss(metric.loss)

    def add_loss(self, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self.losses += 1
            self.loss_sum += loss
            self.low = min(self.low, loss)
            self.high = max(self.high, loss)

    @property
    def loss(self) -> float:
        """The mean over the rounds that had a loss: ask only where ``losses`` is not 0."""
        return self.loss_sum / self.losses


def merge(first: Bin, second: Bin) -> Bin:
    return Bin(
        step=second.step,
        rounds=first.rounds + second.rounds,
        losses=first.losses + second.losses,
        loss_sum=first.loss_sum + second.loss_sum,
        low=min(first.low, second.low),
        high=max(first.high, second.high),
        computing_s=first.computing_s + second.computing_s,
        waiting_s=first.waiting_s + second.waiting_s,
        exchanging_s=first.exchanging_s + second.exchanging_s,
    )


def read_series(path: Path, most: int = MOST_BINS) -> list[Bin]:
    """Bins in the order of the file. A missing file is an empty one; a line cut short is passed over."""
    decode = msgspec.json.Decoder(Metric).decode
    bins: list[Bin] = []
    rounds_a_bin = 1
    try:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    metric = decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # the writer was stopped, or is still at it
                if bins and is_behind(metric):
                    bins[-1].add_loss(metric.loss)
                    continue
                if not bins or bins[-1].rounds >= rounds_a_bin:
                    if len(bins) == 2 * most:
                        bins = [merge(*pair) for pair in zip(bins[::2], bins[1::2], strict=True)]
                        rounds_a_bin *= 2
                    bins.append(Bin(metric.step))
                bins[-1].add(metric)
    except FileNotFoundError:
        return []
    return bins


def smoothed(values: list[float], share: float = 0.02) -> list[float]:
    """A running mean that lags neither way: an exponential one forward, then one backward over the result.

    Each remembers ``share`` of the series, and neither leans towards the value it starts with.
    """
    keep = 1.0 - 1.0 / max(1.0, share * len(values))
    return _exponential(_exponential(values, keep)[::-1], keep)[::-1]


def _exponential(values: list[float], keep: float) -> list[float]:
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        out.append(mean / weight)
    return out


def final_loss(bins: list[Bin]) -> float:
    """The mean over the last 5 % of the steps, at least one: what summary.json calls the loss of a run."""
    start = bins[-1].step - 0.05 * (bins[-1].step - bins[0].step)
    last = [bin for bin in bins if bin.losses and bin.step > start] or [bin for bin in bins if bin.losses][-1:]
    return sum(bin.loss_sum for bin in last) / sum(bin.losses for bin in last)
