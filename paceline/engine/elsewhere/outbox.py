"""The gradients of one host's workers on their way to another host, folded, before and after they are pushed.

    their slots --fold--> outbox --> link     bucket by bucket, as backward passes make them; in the end what differs

Nothing that goes early counts: when it is settled who counts and by how much, everything is folded once more and
compared with what was sent. The outbox is there because slots are written again as soon as a round is over, and what is
sent may have to be sent once more until it has arrived. One worker's gradient is sent as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from paceline.engine.elsewhere.early import Bucket, buckets
from paceline.engine.elsewhere.mail import Letters
from paceline.params.fold import WIDE, fold_into
from paceline.params.table import Table, same_bits, vector_dtype
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory

_LOOK_S = 0.5
_STOP_S = 1.0  # so long its thread may be waiting for room in the link, whose end is not seen yet


class Outbox:
    """Of ``workers`` of ``memory``; it arrives as the arrays ``name``/vector. Gradients of round ``number`` may go,
    those of later ones when that is allowed. ``also``: called when all of a single worker's gradient is there."""

    def __init__(
        self,
        memory: ExchangeMemory,
        table: Table,
        workers: Sequence[int],
        name: str,
        link: Link,
        number: int,
        also: Callable[[Letters], None] = lambda letters: None,
    ) -> None:
        self._memory, self._workers, self._name, self._link, self._also = memory, tuple(workers), name, link, also
        self._letters = Letters(link)
        self._buckets = buckets(table)
        self._sent = {v: torch.zeros(size, dtype=vector_dtype(v)) for v, size in table.dense_sizes.items()}
        most = {v: max(b.stop - b.start for b in self._buckets if b.vector == v) for v in self._sent}
        dtypes = {v: WIDE.get(sent.dtype, sent.dtype) for v, sent in self._sent.items()}
        self._folded = {v: torch.zeros(size, dtype=dtypes[v]) for v, size in most.items()}
        self._shares = dict.fromkeys(workers, 1 / len(workers))  # as they were last time, and before that alike
        self._number, self._finished = number, number - 1  # the round that may go, the last one that is settled
        self._busy = threading.Lock()
        self._over = False
        self.sent_bytes = 0
        self._early = threading.Thread(target=self._send_early, name="paceline-outbox", daemon=True)
        self._early.start()

    def stop(self) -> None:
        """Nothing is sent any more. Its thread ends, at the latest with the link."""
        self._over = True
        for worker in self._workers:
            self._memory.wake_ready(worker)
        self._early.join(_STOP_S)

    def allow(self, number: int) -> None:
        """What is there of this round may go: it overwrites nothing any more that somebody needs."""
        self._number = max(self._number, number)
        for worker in self._workers:
            self._memory.wake_ready(worker)  # who sends may be asleep with buckets that had to wait for this

    def finish(self, number: int, weights: Mapping[int, float]) -> None:
        """Send what of round ``number`` has not been sent: of these workers, in this order. With none, nothing. The
        link may have ended: that is found out by who hears nothing more."""
        total = sum(weights.values())
        with self._busy, suppress(LinkEnded):
            self._finished = number
            if not weights:
                return
            self._shares = {worker: weight / total for worker, weight in weights.items()}
            self._update(number, 0, len(self._buckets))
            if len(self._workers) == 1:
                self._also(self._letters)
            self._letters.send()

    def replaced(self, gradient: Mapping[str, torch.Tensor]) -> None:
        """Who gets what is sent has got this in its place since."""
        with self._busy:
            for vector, sent in self._sent.items():
                sent.copy_(gradient[vector])

    def _update(self, number: int, first: int, count: int) -> None:
        """Send buckets ``[first, count)`` of this round, of them those that are others than what was sent last."""
        shares = list(self._shares.values())
        for place in range(first, min(count, len(self._buckets))):
            bucket = self._buckets[place]
            part, vector = slice(bucket.start, bucket.stop), bucket.vector
            gradients = [self._gradient(worker)[vector][part] for worker in self._shares]
            now, sent = gradients[0], self._sent[vector]
            if len(gradients) > 1:
                folded = self._folded[vector][: len(now)]
                fold_into(folded, gradients, shares)
                now = folded.to(sent.dtype)
            if same_bits(sent[part], now) and not self._is_due(number, place):
                continue
            sent[part] = now
            self._send(number, place, bucket)

    def _is_due(self, number: int, place: int) -> bool:
        """Is it to be sent though it is as it was?"""
        return False

    def _send(self, number: int, place: int, bucket: Bucket) -> None:
        vector = bucket.vector
        name = f"{self._name}/{vector}"
        self.sent_bytes += self._letters.add(name, self._sent[vector], bucket.start, bucket.stop)

    def _gradient(self, worker: int) -> Mapping[str, torch.Tensor]:
        return self._memory.slots[worker].gradient

    def _send_early(self) -> None:
        memory, workers, done = self._memory, self._workers, (0, 0)
        is_alone = len(workers) == 1
        while not (self._over or self._link.ended):
            seen, number = [memory.ready[worker] for worker in workers], self._number
            counts = [memory.count_ready(worker, number) for worker in workers]
            count = min(counts)
            first = done[1] if done[0] == number else 0
            if count > first:
                with self._busy, suppress(LinkEnded):
                    if number > self._finished:  # else the slots may soon have the next gradients
                        is_all = is_alone and count > len(self._buckets)
                        self._update(number, 0 if is_all else first, count)
                        if is_all:
                            self._also(self._letters)
                        self._letters.send()
                done = (number, count)
            else:
                behind = counts.index(count)
                memory.await_ready(workers[behind], seen[behind], _LOOK_S)
