"""Gradients go on their way as backward makes them, bucket by bucket, before the step that they are for.

    post-accumulate hooks -> own slot -> a bucket is full: told -> on the wire, while backward goes on
    step(): what is another gradient by now (accumulation, clipping) is written and sent again

Nothing that was sent early counts: the step says what does. Backward reaches the last parameters first, so buckets are
numbered from the end of each vector. Which backward pass is the step's last cannot be known; it is taken to be the one
that was so last time. If what was early was mostly wrong at the step, it is left for a while. What is small goes with
the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paceline.engine.exchange.replica import Replica
from paceline.params.table import Table, vector_dtype

BUCKET_BYTES = 2**20
_PAUSE_STEPS = 64
LEAST_BYTES = 128 * 1024  # of all together; less is on the wire before another message is read


@dataclass(frozen=True)
class Bucket:
    """The parameters ``params``, which are values ``[start, stop)`` of the vector."""

    vector: str
    start: int
    stop: int
    params: tuple[int, ...]


def buckets(table: Table) -> tuple[Bucket, ...]:
    """All dense parameters, in the order in which backward makes their gradients; adjacent ones together until they are
    large enough."""
    made: list[Bucket] = []
    for vector in table.dense_sizes:
        entries = [(param, entry) for param, entry in enumerate(table.entries) if entry.vector == vector]
        item, params, stop = vector_dtype(vector).itemsize, [], table.sizes[vector]
        for param, entry in reversed(entries):
            params.append(param)
            if (stop - entry.offset) * item >= BUCKET_BYTES or param == entries[0][0]:
                made.append(Bucket(vector, entry.offset, stop, tuple(params)))
                params, stop = [], entry.offset
    return tuple(made)


class Early:
    """Of one exchange. ``tell(place)`` is called when all gradients of bucket number ``place`` are in the slot."""

    def __init__(self, replica: Replica, all_buckets: Sequence[Bucket], tell: Callable[[int], None]) -> None:
        self._replica, self._buckets, self._tell = replica, all_buckets, tell
        self._of = {param: place for place, bucket in enumerate(all_buckets) for param in bucket.params}
        self._left = [len(bucket.params) for bucket in all_buckets]
        self._told: set[int] = set()  # buckets of this step that were told as they are in the slot
        self._came = [0] * len(replica.parameters)  # gradients since the last step, by parameter
        self._last = 1  # how many there were before the last step: the one to wait for
        self._paused = self._wrong = 0
        self.was_finite = True  # what was gathered last
        size_bytes = sum((b.stop - b.start) * vector_dtype(b.vector).itemsize for b in all_buckets)
        for param in self._of if size_bytes >= LEAST_BYTES else ():
            parameter = replica.parameters[param]
            if parameter.requires_grad and parameter.is_leaf and parameter.device.type == "cpu":
                parameter.register_post_accumulate_grad_hook(lambda _, param=param: self._hear(param))

    def use(self, replica: Replica) -> None:
        """From now on gradients are written to this one's slot."""
        self._replica = replica
        self._told = set()
        self._left = [len(bucket.params) for bucket in self._buckets]

    def _hear(self, param: int) -> None:
        self._came[param] += 1
        if self._came[param] != self._last or self._paused or self._of[param] in self._told:
            return
        with torch.no_grad():
            self._replica.write_early(param)
        place = self._of[param]
        self._left[place] -= 1
        if not self._left[place]:
            self._told.add(place)
            self._tell(place)

    def gather(self) -> list[Bucket]:
        """Write the gradients as they are now; the buckets that are others than what was told."""
        replica, early = self._replica, len(self._told)
        self.was_finite = replica.write_gradients()
        rest = [
            bucket
            for place, bucket in enumerate(self._buckets)
            if place not in self._told or not replica.written.isdisjoint(bucket.params)
        ]
        wrong = early + len(rest) - len(self._buckets)
        self._wrong = self._wrong + 1 if 2 * wrong > early else 0
        # What is gathered now, for a norm, may be the step's.
        self._told, replica.early = set(range(len(self._buckets))), set(self._of)
        return rest

    def stepped(self) -> None:
        """What comes now is the next step's."""
        self._told, self._replica.early = set(), set()
        self._left = [len(bucket.params) for bucket in self._buckets]
        self._last = max(1, *self._came)
        self._came = [0] * len(self._came)
        self._paused = _PAUSE_STEPS if self._wrong > 1 else max(self._paused - 1, 0)
