"""Rows of what each worker's steps took, and their merging into one record a round.

A row is 14 float64: the number of its round (or of its group of n pushes), contributors to it, epoch, time it ended
(monotonic seconds of the host), steps in it, sum of loss times samples, samples with a loss, samples, seconds
computing, waiting, exchanging, staleness of the gradient in steps, pushes dropped before it, bytes sent over networks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.events import Metric

ROW = struct.Struct("=14d")
_SUMS = 9


@dataclass
class Row:
    """The round a worker is in; ``stepped`` once its numbers are final but for a loss logged after the step."""

    stepped: bool = False
    key: int = 0
    contributors: int = 0
    epoch: int = 0
    time_s: float = 0.0
    steps: int = 0
    loss_sum: float = 0.0
    loss_samples: float = 0.0
    samples: float = 0.0
    computing_s: float = 0.0
    waiting_s: float = 0.0
    exchanging_s: float = 0.0
    staleness: float = 0.0
    dropped: int = 0
    bytes_sent: int = 0

    def pack(self) -> bytes:
        return ROW.pack(
            self.key,
            self.contributors,
            self.epoch,
            self.time_s,
            self.steps,
            self.loss_sum,
            self.loss_samples,
            self.samples,
            self.computing_s,
            self.waiting_s,
            self.exchanging_s,
            self.staleness,
            self.dropped,
            self.bytes_sent,
        )


def seconds_a_step(rows: bytes) -> Iterator[float]:
    """How long each of them took to compute, with what the script did before."""
    for row in ROW.iter_unpack(rows):
        yield row[8] / max(row[4], 1.0)


@dataclass
class _Merged:
    workers: int = 0
    contributors: int = 0
    epoch: int = 0
    time_s: float = 0.0
    steps: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * _SUMS)
    tellers: set[int] = field(default_factory=set)


@dataclass
class _Behind:
    """What was logged behind an epoch: losses with samples, by worker, and worker 0's other values."""

    losses: dict[int, tuple[float, float]] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)


_STATE: dict[str, Any] = {
    "_open": dict[int, _Merged],
    "_next": int,
    "_steps": int,
    "_values": dict[int, dict[str, float | None]],
    "_behind": dict[int, _Behind],
    "_time_s": float,
    "_gaps": bool,
    "_told": dict[int, int],
    "_shares_steps": bool,
    "begun_s": float | None,
    "dropped": dict[int, int],
}


class Merger:
    """Takes rows as they come from each worker, gives one Metric a round once all its contributors have told."""

    def __init__(self, started_s: float, *, after: int = 0, steps: int = 0) -> None:
        """``after`` is the last round of a run that is resumed, ``steps`` how many steps it had come to."""
        self._started_s = started_s
        self._open: dict[int, _Merged] = {}
        self._next = after + 1
        self._steps = steps
        self._values: dict[int, dict[str, float | None]] = {}
        self._behind: dict[int, _Behind] = {}  # by epoch
        self._time_s = 0.0  # of the last step that was told
        self._gaps = False
        self._told: dict[int, int] = {}  # by worker, the last key that it told of; it tells in their order
        self._shares_steps = False  # may one worker bring all of a step, as with a log?
        self.begun_s: float | None = None
        self.dropped: dict[int, int] = {}  # pushes that came too late, by worker

    def state(self) -> bytes:
        """All that it knows, for ``restore`` of another."""
        return msgspec.msgpack.encode({name: getattr(self, name) for name in _STATE})

    def restore(self, state: bytes) -> None:
        raw = msgspec.msgpack.decode(state, type=dict[str, msgspec.Raw])
        for name, kind in _STATE.items():
            setattr(self, name, msgspec.msgpack.decode(raw[name], type=kind))

    def add(self, rows: bytes, worker: int) -> None:
        """Take in what a worker tells."""
        for row in ROW.iter_unpack(rows):
            key = int(row[0])
            self._told[worker] = max(key, self._told.get(worker, 0))
            merged = self._open.get(key)
            if merged is None:
                merged = self._open[key] = _Merged(contributors=int(row[1]))
            merged.workers += 1
            self._shares_steps |= worker in merged.tellers
            merged.tellers.add(worker)
            merged.epoch = max(merged.epoch, int(row[2]))
            merged.time_s = max(merged.time_s, row[3])
            merged.steps = max(merged.steps, int(row[4]))
            if row[12]:
                self.dropped[worker] = self.dropped.get(worker, 0) + int(row[12])
            for place in range(_SUMS):
                merged.sums[place] += row[5 + place]
            begun_s = row[3] - row[8] - row[9] - row[10]
            self.begun_s = min(begun_s, self.begun_s or begun_s)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._values.setdefault(step, {}).update(values)

    def log_behind(self, epoch: int, worker: int, loss: float | None, samples: float, values: dict[str, float]) -> None:
        """Of what a worker logs as its loss behind one epoch the last counts; of other values worker 0's."""
        behind = self._behind.setdefault(epoch, _Behind())
        if loss is not None:
            behind.losses[worker] = (loss, samples)
        if worker == 0:
            behind.values.update(values)

    def lost(self, worker: int) -> None:
        """A worker has died: what it had not told yet is not waited for."""
        self._gaps = True
        self.left(worker)

    def left(self, worker: int) -> None:
        """A worker has told all that it had to tell; another may come in its place."""
        self._told.pop(worker, None)

    def ready(self, *, everything: bool = False) -> Iterator[Metric]:
        """The rounds that are complete, in order; with ``everything`` also those that are not."""
        behind = 0
        if self._gaps:  # some will never be whole; who tells of a round has told of those before
            whole = [key for key, merged in self._open.items() if len(merged.tellers) >= merged.contributors]
            slowest = min(self._told.values(), default=0)
            # One who lives may have told nothing yet of rounds that it was in before others went on without it.
            behind = max(*whole, slowest, 0) if self._shares_steps else min(max(whole, default=0), slowest + 1)
        for key in sorted(self._open):
            merged = self._open[key]
            if not everything and key >= behind and (key != self._next or merged.workers < merged.contributors):
                return
            yield from self._metrics_behind(before=merged.epoch)  # its workers have logged before they stepped again
            is_late = key < self._next  # a newcomer's, of a step that was told without it
            self._next = max(self._next, key + 1)
            yield self._metric(key, self._open.pop(key), is_late=is_late)
        if everything:
            yield from self._metrics_behind()

    def _metrics_behind(self, before: int | None = None) -> Iterator[Metric]:
        """A record for each epoch ``before`` this one behind which something was logged."""
        for epoch in sorted(known for known in self._behind if before is None or known < before):
            behind = self._behind.pop(epoch)
            samples = sum(count for _, count in behind.losses.values())
            total = sum(loss * count for loss, count in behind.losses.values())
            if samples or behind.values:
                loss = total / samples if samples else None
                yield Metric(self._steps, epoch, self._time_s, loss, 0, 0.0, 0.0, 0.0, values=behind.values)

    def _metric(self, key: int, merged: _Merged, *, is_late: bool) -> Metric:
        loss_sum, loss_samples, samples, computing, waiting, exchanging, staleness, dropped, sent = merged.sums
        if not is_late:
            self._steps = max(self._steps + merged.steps, key)  # what nobody told (a killed worker) counts too
        time_s = round(merged.time_s - self._started_s, 6)
        self._time_s = max(self._time_s, time_s)
        return Metric(
            step=self._steps,
            epoch=merged.epoch,
            time_s=time_s,
            loss=loss_sum / loss_samples if loss_samples else None,
            samples=round(samples),
            computing_s=round(computing / merged.workers, 6),
            waiting_s=round(waiting / merged.workers, 6),
            exchanging_s=round(exchanging / merged.workers, 6),
            bytes_sent=round(sent),
            staleness=round(staleness / merged.workers, 3),
            dropped=round(dropped),
            values=self._values_up_to(key),
        )

    def _values_up_to(self, key: int) -> dict[str, float | None]:
        """What was logged of this round, and of those before it after they had been told, or that are never told."""
        values: dict[str, float | None] = {}
        for known in sorted(known for known in self._values if known <= key):
            values |= self._values.pop(known)
        return values
