"""What others push, on its way to a mirror on another host (mirror.py): the deputy's side of it.

    their slots -> outbox -> link     bucket by bucket, as their backward makes them; what differs when a round closes

Nothing that goes early counts: when the round has closed, every slot that it is stepped with is compared with what was
sent. The outbox is there because slots are written again as soon as the round is over, and what is sent may have to be
sent once more until it has arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch

from paceline.engine.elsewhere.early import Bucket, buckets
from paceline.engine.elsewhere.mail import send, send_range
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.shards import counting
from paceline.params.table import same_bits, vector_dtype
from paceline.protocol import remote
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link

_LOOK_S = 0.5


class Forward:
    """From the slots of ``others`` to the mirror of exchange ``index`` at the other end of ``link``. ``early``: whose
    gradients go before they are pushed."""

    def __init__(self, exchange: Exchange, index: int, others: Sequence[int], early: int, link: Link) -> None:
        self._memory, self._table, self._index, self._link = exchange.memory, exchange.spec.table, index, link
        self._others, self._of = frozenset(others), early
        self._buckets = buckets(self._table)
        self._outbox: dict[int, dict[str, torch.Tensor]] = {}
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # the same of tables: numbers, values
        self._took = self._closed = exchange.number  # the last round that the mirror has stepped, that has closed here
        self._follow: remote.Follow | None = None
        self._settings = (-1, -1)  # whose settings the mirror has, in which version
        self._busy = threading.Lock()
        self._over = False
        self.sent_bytes = 0
        rounds = exchange.in_rounds
        assert rounds is not None
        rounds.on_close = self._close
        self._early = threading.Thread(target=self._send_early, args=(early,), name="paceline-forward", daemon=True)
        self._early.start()

    def stop(self) -> None:
        self._over = True

    def took(self, number: int) -> None:
        """The mirror has stepped this round, or was filled anew."""
        self._took = max(self._took, number)
        self._memory.wake_ready(self._of)  # it may be asleep with buckets that had to wait for this

    def follow(self, number: int) -> remote.Follow | None:
        """What the mirror is told of this round, the last; None if this worker was not in it."""
        return self._follow if self._follow is not None and self._follow.number == number else None

    def _close(self, number: int, contributors: tuple[int, ...]) -> None:
        """The round is closed: send what of it has not been sent."""
        slots = self._memory.slots
        weights = [slots[worker].weight(number) for worker in contributors]
        counted = {w for w, share in zip(contributors, counting(weights), strict=True) if share is not None}
        masks = {worker: bytes(slots[worker].mask) for worker in counted}
        with self._busy, suppress(LinkEnded):  # it is found out when the answer is sent
            self._closed = number
            for worker in sorted(counted & self._others):
                for bucket in self._buckets:
                    self._update(worker, bucket)
                self._send_rows(worker, masks[worker])
        first = contributors[0]
        known = (first, slots[first].settings_version)
        settings = b"" if known == self._settings else slots[first].settings
        self._settings = known
        sources = [(w, weight, masks.get(w, b"")) for w, weight in zip(contributors, weights, strict=True)]
        self._follow = remote.Follow(number, self._memory.loads[0], sources, settings)

    def _update(self, worker: int, bucket: Bucket) -> None:
        """Send a bucket of a slot, if it is another than what was sent last."""
        now = self._memory.slots[worker].gradient[bucket.vector]
        if worker not in self._outbox:
            sizes = self._table.dense_sizes
            self._outbox[worker] = {v: torch.zeros(size, dtype=vector_dtype(v)) for v, size in sizes.items()}
        sent = self._outbox[worker][bucket.vector]
        part = slice(bucket.start, bucket.stop)
        if same_bits(sent[part], now[part]):
            return
        sent[part] = now[part]
        name = f"push/{self._index}/{worker}/{bucket.vector}"
        self.sent_bytes += send_range(self._link, name, sent, bucket.start, bucket.stop)

    def _send_rows(self, worker: int, mask: bytes) -> None:
        slot, name = self._memory.slots[worker], f"push/{self._index}/{worker}"
        for param, area in slot.rows.items():
            if not mask[param]:
                continue
            entry, count = self._table.entries[param], abs(int(area[0]))
            numbers = area[: count + 1].clone()  # how many, then which
            values = slot.gradient[entry.vector][entry.offset : entry.offset + count * entry.row].clone()
            sent = self._rows.get((worker, param))
            if sent is not None and len(sent[0]) == len(numbers) and all(map(same_bits, sent, (numbers, values))):
                continue
            self._rows[worker, param] = numbers, values
            self.sent_bytes += send(self._link, f"{name}/count/{param}", numbers[:1])
            self.sent_bytes += send(self._link, f"{name}/numbers/{param}", numbers[1:])
            self.sent_bytes += send(self._link, f"{name}/values/{param}", values)

    def _send_early(self, worker: int) -> None:
        memory, done = self._memory, (0, 0)
        while not self._over:
            seen, number = memory.ready[worker], self._took + 1
            count = memory.count_ready(worker, number)
            first = done[1] if done[0] == number else 0
            if count > first:
                with self._busy, suppress(LinkEnded):
                    if number > self._closed:  # else the slot may soon have the next gradient
                        self._update_early(worker, first, count)
                done = (number, count)
            else:
                memory.await_ready(worker, seen, _LOOK_S)

    def _update_early(self, worker: int, first: int, count: int) -> None:
        """Buckets ``[first, count)`` are there; one more than there are: the step's gradient is, with its rows."""
        is_all = count > len(self._buckets)
        for bucket in self._buckets if is_all else self._buckets[first:count]:
            self._update(worker, bucket)
        if is_all:
            self._send_rows(worker, bytes(self._memory.slots[worker].mask))
