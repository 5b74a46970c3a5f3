"""The shards of one exchange as one process sees them: made when first needed, with the settings of who pushes.

What is common to stepping a round's share (``stepper.py``) and applying an entry of the log (``applier.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paceline.params.chunk import Target
from paceline.params.optimizers import Group, clone, decode
from paceline.params.shard import Shard
from paceline.transport.slots import ExchangeMemory, Slot, Spec

VOID = -1.0  # the weight of a push without a gradient worth applying (GradScaler found an overflow)


class Shards:
    """``source`` is the user's optimizer's attributes, or empty in a server; ``optimizer_class`` its class."""

    def __init__(self, spec: Spec, memory: ExchangeMemory, optimizer_class: type, source: Mapping[str, Any]) -> None:
        self._spec, self._memory = spec, memory
        self._target = Target(
            spec.table,
            memory.params,
            memory.state,
            lambda groups: clone(source, optimizer_class, groups),
            decode(spec.settings),
            whole=spec.whole,
            stamps=memory.stamps,
        )
        self._all = bytes([1]) * len(spec.table.entries)
        self._shards: dict[tuple[int, int], Shard] = {}
        self._settings: dict[int, tuple[int, list[Group]]] = {}  # worker -> version, groups
        self._has: dict[Shard, list[Group]] = {}

    def get(self, part: int, parts: int) -> Shard:
        """Part ``part`` of ``parts``."""
        shard = self._shards.get((part, parts))
        if shard is None:
            shard = self._shards[part, parts] = Shard(self._target, self._spec.cut(parts)[part])
        return shard

    def new_settings(self, shard: Shard, worker: int) -> list[Group] | None:
        """The hyper-parameters in this worker's slot, if the shard does not have them yet."""
        slot = self._memory.slots[worker]
        version = slot.settings_version
        known = self._settings.get(worker)
        if known is None or known[0] != version:
            known = self._settings[worker] = version, decode(slot.settings)
        groups = known[1]
        had = self._has.get(shard)
        if had is groups or had == groups:
            return None
        self._has[shard] = groups
        return groups

    def weighted(self, slots: Sequence[Slot], weights: Sequence[float]) -> tuple[list[Slot], list[float]]:
        """The slots whose gradients count, and their weights; none where all pushes are void."""
        shares = [(slot, share) for slot, share in zip(slots, counting(weights), strict=True) if share is not None]
        return [slot for slot, _ in shares], [share for _, share in shares]

    def union(self, masks: Sequence[memoryview[int]]) -> bytes | None:
        """For each parameter, does any mask have it? None: all have all."""
        if all(mask == self._all for mask in masks):
            return None
        return bytes(max(column) for column in zip(*masks, strict=True))


def counting(weights: Sequence[float]) -> list[float | None]:
    """By how much pushes of these weights count; None for one that does not."""
    if any(weight > 0 for weight in weights):
        return [weight if weight > 0 else None for weight in weights]
    return [1.0 if weight >= 0 else None for weight in weights]  # nobody counts samples: all count alike
