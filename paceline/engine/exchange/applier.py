"""Apply entries of the log to parts of the parameters: whose turn it is does, a worker for its own or a server.

STEP of one member (bounded, async):  g, unweighted, with lr / max(1, staleness) where damping is asked for
                                      (Zhang et al. 2016), and g + lambda g^2 (w - w_pulled) where compensation is
                                      (Zheng et al. 2017); sparse rows are not compensated
STEP of a quorum:                     the mean weighted by samples, as in a round of all
"""

from __future__ import annotations

from paceline.engine.exchange.shards import Shards
from paceline.params.shard import Shard
from paceline.protocol.log import STEP, Entry
from paceline.transport.slots import ExchangeMemory, Spec


class Applier:
    """The hands of one process over all parts of ``memory``."""

    def __init__(self, spec: Spec, shards: Shards, memory: ExchangeMemory) -> None:
        self._shards, self._memory, self._spec = shards, memory, spec
        self._loaded: dict[Shard, int] = {}  # the last load that the shard knows of

    def apply(self, part: int, entry: Entry) -> None:
        """Apply ``entry`` to ``part``; it must be the part's turn (``applied[part] == entry.number - 1``)."""
        shard = self._shards.get(part, self._spec.parts)
        if entry.kind == STEP:
            self._step(shard, part, entry)
        for worker in {entry.by, *entry.members}:
            shard.copy_to(self._memory.slots[worker].copy)
        self._memory.applied[part] = entry.number

    def _step(self, shard: Shard, part: int, entry: Entry) -> None:
        memory = self._memory
        slots = [memory.slots[worker] for worker in entry.members]
        weights = [memory.slots[worker].weight(memory.pushed[worker]) for worker in entry.members]
        slots, weights = self._shards.weighted(slots, weights)
        if not slots:
            return
        loaded = memory.log.loaded
        if self._loaded.get(shard, 0) < loaded:
            self._loaded[shard] = min(loaded, entry.number)  # the last one is yet to come, and one before it is new
            shard.forget()
        shard.follow()
        if self._spec.compensate:
            shard.fold_compensated(slots[0], slots[0].copy, self._spec.compensate)
        else:
            shard.fold(slots, weights)
        settings = self._shards.new_settings(shard, entry.members[0])
        rate = 1.0 / max(1, entry.staleness) if self._spec.damping else 1.0
        mask, undo = self._shards.union([slot.mask for slot in slots]), memory.undo[part]
        shard.step(settings, mask, rate=rate, undo=undo, number=entry.number)
