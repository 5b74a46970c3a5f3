"""What others push, on its way to a mirror on another host (mirror.py): the deputies' side of it.

    their slots -> outbox.py -> link     and, when the round is closed, what the mirror has to know to step it (Follow)

Where the mirror is that of several workers, the deputy of the first of them sends, and each tells its own worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.engine.elsewhere.mail import Letters
from paceline.engine.elsewhere.mirror import sources_of
from paceline.engine.elsewhere.outbox import Outbox
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.shards import counting
from paceline.params import rows
from paceline.params.fold import counted_as
from paceline.params.table import same_bits
from paceline.protocol import remote
from paceline.transport.link import Link


class Forward:
    """From the slots of ``others`` to the mirror of exchange ``index`` at the other end of ``link``, which is that of
    ``members`` or, without any, of one worker; the first of them has the ``link`` that gradients go over. ``closed`` is
    called when a round has closed that the mirror can step, with what that is to be told."""

    def __init__(
        self,
        exchange: Exchange,
        index: int,
        others: Sequence[int],
        members: Sequence[int],
        link: Link | None,
        closed: Callable[[remote.Follow], None],
    ) -> None:
        self._closed = closed
        self._memory, self._table, self._index = exchange.memory, exchange.spec.table, index
        self._others, self._members = tuple(others), frozenset(members)
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of tables: numbers, values as they were sent
        self._follow: remote.Follow | None = None
        self._settings = (-1, -1)  # whose settings the mirror has, in which version
        self._rows_bytes = 0
        self._outbox: Outbox | None = None
        if link is not None:
            name = f"push/{index}/{self._others[0]}"
            self._outbox = Outbox(
                self._memory, self._table, others, name, link, exchange.number + 1, also=self._send_rows
            )
        rounds = exchange.in_rounds
        assert rounds is not None
        rounds.on_close = self._close

    @property
    def sent_bytes(self) -> int:
        return self._rows_bytes + (0 if self._outbox is None else self._outbox.sent_bytes)

    def stop(self) -> None:
        if self._outbox is not None:
            self._outbox.stop()

    def took(self, number: int) -> None:
        """The mirror has stepped this round, or was filled anew."""
        if self._outbox is not None:
            self._outbox.allow(number + 1)

    def follow(self, number: int) -> remote.Follow | None:
        """What the mirror is told of this round, the last; None if it cannot step that."""
        return self._follow if self._follow is not None and self._follow.number == number else None

    def _close(self, number: int, contributors: tuple[int, ...]) -> None:
        """The round is closed: send what of it has not been sent."""
        slots = self._memory.slots
        weights = [slots[worker].weight(number) for worker in contributors]
        counted = {w: s for w, s in zip(contributors, counting(weights), strict=True) if s is not None}
        follows = not self._members or all(slots[w].lies_in(number) is not None for w in self._members)
        if self._outbox is not None:
            others = [w for w in counted if (w not in self._members if self._members else w in self._others)]
            factors = [slots[w].factor(number) for w in others]
            as_one = counted_as([counted[w] for w in others], factors)
            self._outbox.finish(number, dict(zip(others, as_one, strict=True)) if follows else {})
        self._follow = None
        if not follows:
            return
        first = contributors[0]
        known = (first, slots[first].settings_version)
        settings = b"" if known == self._settings else slots[first].settings
        self._settings = known
        sources = sources_of(slots, number, contributors)
        self._follow = remote.Follow(number, self._memory.loads[0], sources, settings)
        self._closed(self._follow)

    def _send_rows(self, letters: Letters) -> None:
        """Of one worker, whose gradient is in its slot: rows of tables, where they are others than what was sent."""
        (worker,) = self._others
        slot, name = self._memory.slots[worker], f"push/{self._index}/{worker}"
        for param, area in slot.rows.items():
            if not slot.mask[param]:
                continue
            entry, count = self._table.entries[param], abs(int(area[0]))
            numbers = area[: count + 1].clone()  # how many, then which
            size = rows.count_values(numbers[1:]) * entry.row
            values = slot.gradient[entry.vector][entry.offset : entry.offset + size].clone()
            sent = self._rows.get(param)
            if sent is not None and len(sent[0]) == len(numbers) and all(map(same_bits, sent, (numbers, values))):
                continue
            self._rows[param] = numbers, values
            self._rows_bytes += letters.add(f"{name}/count/{param}", numbers[:1], 0, 1)
            self._rows_bytes += letters.add(f"{name}/numbers/{param}", numbers[1:], 0, count)
            self._rows_bytes += letters.add(f"{name}/values/{param}", values, 0, size)
