"""What the workers of a host bring, folded, on its way to the owners of shares of it (owners.py).

slots of the host's workers -> fold, bucket by bucket, as all have made it --parts--> the owners
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.outbox import Outbox
from paceline.engine.elsewhere.owners import Owners, Vectors
from paceline.engine.elsewhere.table_parts import folded_of, rows_of
from paceline.engine.exchange.replica import Apart
from paceline.params.fold import Pushed
from paceline.params.rows import Rows
from paceline.params.table import Table
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory


class HostFold(Outbox):
    """Of ``workers``, one host's, whose gradients are in their slots; ``apart``: that of the first of them is there.
    When ``link``, which is home's, has ended nothing goes any more."""

    def __init__(
        self,
        memory: ExchangeMemory,
        table: Table,
        workers: Sequence[int],
        link: Link,
        number: int,
        owners: Owners,
        apart: Apart | None,
    ) -> None:
        self._owners, self._apart, self._lead, self._table = owners, apart, workers[0], table
        self._folded_rows: dict[int, Rows] = {}
        self._told: tuple[int, set[int]] = (0, set())  # in which round, which buckets
        super().__init__(memory, table, workers, "", link, number)

    @property
    def vectors(self) -> Vectors:
        """Where the fold is."""
        return self._sent

    def rows(self, param: int) -> Rows:
        """The fold of a table's rows, as it was finished last."""
        return self._folded_rows[param]

    def finish(self, number: int, weights: Mapping[int, float]) -> None:
        """As of any outbox; rows are folded now, and given with all else."""
        super().finish(number, weights)
        total = sum(weights.values())
        shares = [weight / total for weight in weights.values()]
        for param, entry in enumerate(self._table.entries) if weights else ():
            if entry.row:
                sources = [rows_of(self._brought(worker), param, entry) for worker in weights]
                self._folded_rows[param] = folded_of(sources, shares, entry)

    def _brought(self, worker: int) -> Pushed:
        return self._memory.slots[worker] if self._apart is None or worker != self._lead else self._apart

    def _gradient(self, worker: int) -> Mapping[str, torch.Tensor]:
        return self._brought(worker).gradient

    def _is_due(self, number: int, place: int) -> bool:
        return self._told[0] != number or place not in self._told[1]

    def _send(self, number: int, place: int, bucket: Bucket) -> None:
        if self._owners.number != number:
            return  # it is due at the step
        if self._told[0] != number:
            self._told = number, set()
        self._told[1].add(place)
        self._owners.tell([place])
