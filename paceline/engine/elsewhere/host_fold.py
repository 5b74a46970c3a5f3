"""What the workers of a host bring, folded, on its way to the owners of shares of it (owners.py).

slots of the host's workers -> fold, bucket by bucket, as all have made it --parts--> the owners
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.outbox import Outbox
from paceline.engine.elsewhere.owners import Owners, Vectors
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
        apart: Vectors | None,
    ) -> None:
        self._owners, self._apart, self._lead = owners, apart, workers[0]
        self._told: tuple[int, set[int]] = (0, set())  # in which round, which buckets
        super().__init__(memory, table, workers, "", link, number)

    @property
    def vectors(self) -> Vectors:
        """Where the fold is."""
        return self._sent

    def _gradient(self, worker: int) -> Mapping[str, torch.Tensor]:
        return super()._gradient(worker) if self._apart is None or worker != self._lead else self._apart

    def _is_due(self, number: int, place: int) -> bool:
        return self._told[0] != number or place not in self._told[1]

    def _send(self, number: int, place: int, bucket: Bucket) -> None:
        if self._owners.number != number:
            return  # it is due at the step
        if self._told[0] != number:
            self._told = number, set()
        self._told[1].add(place)
        self._owners.tell([place])
