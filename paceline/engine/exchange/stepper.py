"""Close a round in one process: fold and step its share of an exchange's memory.

Shares follow from who contributes, so they change when a worker runs out of data; the optimizer's state lies in
the shared memory and any process can go on with any share, also in the midst of its step (params/undo.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.exchange.shards import Shards
from paceline.params.fold import Fold, Pushed
from paceline.params.shard import Shard
from paceline.transport.slots import ExchangeMemory, Slot


class Stepper:
    """Steps one process's shares of ``memory``, round after round. ``saves``: another may go on in the midst of it."""

    def __init__(self, shards: Shards, memory: ExchangeMemory, *, saves: bool = True) -> None:
        self._shards, self._memory, self._saves = shards, memory, saves
        self._last: dict[Shard, tuple[int, int]] = {}  # the round it was stepped in, checkpoints loaded by then

    def step(self, number: int, contributors: tuple[int, ...], share: int, shares: int) -> None:
        """Fold round ``number`` of ``contributors`` and step this share of so many, or what is left of it to step."""
        shard = self._shards.get(share, shares)
        loads = self._memory.loads[0]  # whoever loads does so before its push, so all see the same here
        if self._last.get(shard) != (number - 1, loads):
            shard.forget()
            shard.resume()
        self._last[shard] = number, loads
        slots, weights = self._counted(number, contributors)
        if slots:
            shard.fold(*by_host(slots, weights, self._memory.slots, number))
            settings = self._shards.new_settings(shard, contributors[0])
            mask = self._shards.union([slot.mask for slot in slots])
            undo = self._memory.undo[share] if self._saves else None
            shard.step(settings, mask, undo=undo, number=number)

    def norm(self, number: int, contributors: tuple[int, ...], me: int, order: float) -> float:
        """Member ``me``'s part of the norm of the folded gradient: sum of |g|^order, or the maximum for infinity.

        Over the parameters that any contributor has chosen. Steps nothing.
        """
        slots, weights = self._counted(number, contributors)
        if not slots:
            return 0.0
        shard = self._shards.get(contributors.index(me), len(contributors))
        shard.fold(slots, weights)
        return shard.norm(self._shards.union([slot.chosen for slot in slots]), order)

    def _counted(self, number: int, contributors: tuple[int, ...]) -> tuple[list[Slot], list[float]]:
        """The slots that count, with their weights."""
        slots = [self._memory.slots[worker] for worker in contributors]
        return self._shards.weighted(slots, [slot.weight(number) for slot in slots])


def by_host(
    counted: Sequence[Slot], weights: Sequence[float], slots: Sequence[Slot], number: int
) -> tuple[Sequence[Pushed | Fold], Sequence[float]]:
    """What is folded in round ``number``, with weights: the slots that count, or, where those of a host have been
    folded already and lie in one of them, that one for all of these and the others' fold (docs/decisions/0017)."""
    hosts: dict[int | None, tuple[list[Slot], list[float]]] = {}
    for slot, weight in zip(counted, weights, strict=True):
        own, shares = hosts.setdefault(slot.lies_in(number), ([], []))
        own.append(slot)
        shares.append(weight)
    if list(hosts) == [None]:
        return counted, weights
    sources: list[Pushed | Fold] = []
    for place, (own, shares) in hosts.items():
        total = sum(shares)
        sources.append(Fold(own, [one / total for one in shares]) if place is None else slots[place])
    return sources, [sum(shares) for _, shares in hosts.values()]
