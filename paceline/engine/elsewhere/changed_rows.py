"""Which rows of an exchange's tables a worker elsewhere has otherwise than home: those are sent, not the table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.transport.slots import ExchangeMemory, Spec


class ChangedRows:
    """Of one worker. Where home keeps in which step each row was last (``stamps``) it looks there; else it keeps what
    the worker has."""

    def __init__(self, memory: ExchangeMemory, spec: Spec) -> None:
        self._memory, self._spec = memory, spec
        self._told: dict[int, tuple[int, int]] = {}  # by table: after which step, and checkpoints loaded by then
        self._known: dict[int, torch.Tensor] = {}  # by table, as the worker has it

    def take(
        self, param: int, now: torch.Tensor, some: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers and values of the rows, of those in the ranges ``some`` or of all, that it has otherwise than
        ``now``. From now on it has them."""
        ranges = some or [(0, len(now))]
        if param not in self._memory.stamps:
            return self._compare(param, now, ranges)
        done, loads = self._done(), self._memory.loads[0]  # before it looks: what is stepped meanwhile counts next time
        told, at = self._told.get(param, (-1, -1))
        self._told[param] = done, loads
        stamps = self._memory.stamps[param].numpy()
        least = told if at == loads else -1
        found = [np.flatnonzero(stamps[first:end] > least) + first for first, end in ranges]
        numbers = torch.from_numpy(np.concatenate(found))
        return numbers, now[numbers]

    def _done(self) -> int:
        """The last round, or entry, that all who step here have stepped whole."""
        memory, spec = self._memory, self._spec
        if spec.parts:
            return min(memory.applied)
        crew = memory.stepped[spec.workers :][: memory.crew[0]]
        return min(crew, default=0)

    def _compare(
        self, param: int, now: torch.Tensor, ranges: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._known.get(param)
        if known is None:
            self._known[param] = now.clone()
            numbers = torch.cat([torch.arange(first, end) for first, end in ranges])
            return numbers, self._known[param][numbers]
        found = [now[first:end].ne(known[first:end]).any(1).nonzero()[:, 0] + first for first, end in ranges]
        numbers = torch.cat(found)
        known[numbers] = rows = now[numbers]
        return numbers, rows
