"""Close a round in one process: fold and step its share of an exchange's memory.

Shares follow from who contributes, so they change when a worker runs out of data; the optimizer's state lies in
the shared memory and any process can go on with any share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.params.optimizers import Group, clone, decode
from paceline.params.shard import Shard
from paceline.protocol.partition import partition
from paceline.transport.slots import ExchangeMemory, Slot, Spec


class Stepper:
    """``source`` is the user's optimizer's attributes, or empty in a server; ``optimizer_class`` its class."""

    def __init__(self, spec: Spec, memory: ExchangeMemory, optimizer_class: type, source: Mapping[str, Any]) -> None:
        self._spec, self._memory, self._class, self._source = spec, memory, optimizer_class, source
        self._sizes = [entry.size for entry in spec.table.entries]
        self._all = bytes([1]) * len(self._sizes)
        self._shards: dict[tuple[int, int], Shard] = {}
        self._last: tuple[tuple[int, ...], int] = ((), -1)
        self._shard: Shard | None = None
        self._settings_from = (-1, 0)
        self._settings: list[Group] | None = None
        self._set_in: set[Shard] = set()  # the shards that have these settings

    def take_up(self, number: int, steppers: tuple[int, ...], me: int) -> bool:
        """Get hold of the share of member ``me`` among ``steppers`` in round ``number``. Have the shares moved?

        All steppers come to the same answer. If it is yes, each has just read state that another may be about to
        step, so all must have come here before anyone calls ``step``.
        """
        moved = self._last != (steppers, number - 1)
        self._last = (steppers, number)
        if moved:
            self._shard = self._find(steppers.index(me), len(steppers))
            self._shard.resume()
        return moved

    def step(self, number: int, contributors: tuple[int, ...]) -> None:
        """Fold round ``number`` of ``contributors`` and step the share taken up."""
        assert self._shard is not None, "step before take_up"
        slots, weights = self._sources(number, contributors)
        self._shard.fold([slot.gradient for slot in slots], weights)
        self._shard.step(self._new_settings(contributors[0]), self._union([slot.mask for slot in slots]))

    def norm(self, number: int, contributors: tuple[int, ...], me: int, order: float) -> float:
        """Member ``me``'s part of the norm of the folded gradient: sum of |g|^order, or the maximum for infinity.

        Over the parameters that any contributor has chosen. Steps nothing.
        """
        slots, weights = self._sources(number, contributors)
        shard = self._find(contributors.index(me), len(contributors))
        shard.fold([slot.gradient for slot in slots], weights)
        return shard.norm(self._union([slot.chosen for slot in slots]), order)

    def _sources(self, number: int, contributors: tuple[int, ...]) -> tuple[list[Slot], list[float]]:
        """The slots that count, with their weights."""
        slots = [self._memory.slots[worker] for worker in contributors]
        weights = [slot.weight(number) for slot in slots]
        if not any(weights):
            return slots, [1.0] * len(slots)  # nobody counts samples: all count alike
        if not all(weights):
            slots = [slot for slot, weight in zip(slots, weights, strict=True) if weight]
        return slots, [weight for weight in weights if weight]

    def _find(self, part: int, parts: int) -> Shard:
        shard = self._shards.get((part, parts))
        if shard is None:
            pieces = partition(self._sizes, parts, whole=self._spec.whole)[part]
            shard = self._shards[part, parts] = Shard(
                self._spec.table,
                pieces,
                self._memory.params,
                self._memory.state,
                lambda groups: clone(self._source, self._class, groups),
                decode(self._spec.settings),
                whole=self._spec.whole,
            )
        return shard

    def _new_settings(self, worker: int) -> list[Group] | None:
        """The hyper-parameters of this worker, the lowest of the round, if the shard does not have them yet."""
        slot = self._memory.slots[worker]
        source = (worker, slot.settings_version)
        if source != self._settings_from:
            self._settings, self._settings_from = decode(slot.settings), source
            self._set_in.clear()
        if self._shard in self._set_in:
            return None
        assert self._shard is not None
        self._set_in.add(self._shard)
        return self._settings

    def _union(self, masks: list[memoryview[int]]) -> bytes | None:
        """For each parameter, does any mask have it? None: all have all."""
        if all(mask == self._all for mask in masks):
            return None
        return bytes(max(column) for column in zip(*masks, strict=True))
