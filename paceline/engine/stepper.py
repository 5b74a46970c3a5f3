"""Close a round in one process: fold and step its share of an exchange's memory.

Shares follow from who contributes, so they change when a worker runs out of data; the optimizer's state lies in
the shared memory and any process can go on with any share.
"""

from __future__ import annotations

from paceline.engine.shards import Shards
from paceline.params.shard import Shard
from paceline.transport.slots import ExchangeMemory, Slot


class Stepper:
    """Steps one process's shares of ``memory``, round after round."""

    def __init__(self, shards: Shards, memory: ExchangeMemory) -> None:
        self._shards, self._memory = shards, memory
        self._last: tuple[tuple[int, ...], int, int] = ((), -1, 0)
        self._shard: Shard | None = None

    def take_up(self, number: int, steppers: tuple[int, ...], me: int) -> bool:
        """Get hold of the share of member ``me`` among ``steppers`` in round ``number``. Have the shares moved?

        All steppers come to the same answer. If it is yes, each has just read state that another may be about to
        step, so all must have come here before anyone calls ``step``.
        """
        loads = self._memory.loads[0]  # whoever loads does so before its push, so all see the same here
        moved = self._last != (steppers, number - 1, loads)
        self._last = (steppers, number, loads)
        if moved:
            self._shard = self._shards.get(steppers.index(me), len(steppers))
            self._shard.forget()
            self._shard.resume()
        return moved

    def step(self, number: int, contributors: tuple[int, ...]) -> None:
        """Fold round ``number`` of ``contributors`` and step the share taken up."""
        shard = self._shard
        assert shard is not None, "step before take_up"
        slots, weights = self._sources(number, contributors)
        if slots:
            shard.fold(slots, weights)
            settings = self._shards.new_settings(shard, contributors[0])
            shard.step(settings, self._shards.union([slot.mask for slot in slots]))

    def norm(self, number: int, contributors: tuple[int, ...], me: int, order: float) -> float:
        """Member ``me``'s part of the norm of the folded gradient: sum of |g|^order, or the maximum for infinity.

        Over the parameters that any contributor has chosen. Steps nothing.
        """
        slots, weights = self._sources(number, contributors)
        shard = self._shards.get(contributors.index(me), len(contributors))
        shard.fold(slots, weights)
        return shard.norm(self._shards.union([slot.chosen for slot in slots]), order)

    def _sources(self, number: int, contributors: tuple[int, ...]) -> tuple[list[Slot], list[float]]:
        """The slots that count, with their weights."""
        slots = [self._memory.slots[worker] for worker in contributors]
        return self._shards.weighted(slots, [slot.weight(number) for slot in slots])
