"""Close a round in one process: fold and step its share of an exchange's memory.

Shares follow from who contributes, so they change when a worker runs out of data; the optimizer's state lies in
the shared memory and any process can go on with any share, also in the midst of its step (params/undo.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engine.exchange.shards import Shards
from paceline.params.fold import Fold, Pushed, shares_of
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
            factors = [slot.factor(number) for slot in slots]
            shard.fold(*by_host(slots, weights, factors, self._memory.slots, number))
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
        shard.fold(*by_host(slots, weights, [1.0] * len(slots), self._memory.slots, number))
        return shard.norm(self._shards.union([slot.chosen for slot in slots]), order)

    def _counted(self, number: int, contributors: tuple[int, ...]) -> tuple[list[Slot], list[float]]:
        """The slots that count, with their weights."""
        slots = [self._memory.slots[worker] for worker in contributors]
        return self._shards.weighted(slots, [slot.weight(number) for slot in slots])


def by_host(
    counted: Sequence[Slot],
    weights: Sequence[float],
    factors: Sequence[float],
    slots: Sequence[Slot],
    number: int,
) -> tuple[Sequence[Pushed | Fold], Sequence[float], Sequence[float]]:
    """What is folded in round ``number``, with weights and factors: the slots that count, or, where those of a host
    have been folded already and lie in one of them, that one for all of these and the others' fold (decision 17)."""
    hosts: dict[int | None, list[int]] = {}  # where it lies -> which of the slots
    for place, slot in enumerate(counted):
        hosts.setdefault(slot.lies_in(number), []).append(place)
    if list(hosts) == [None]:
        return counted, weights, factors
    sources: list[Pushed | Fold] = []
    totals: list[tuple[float, float]] = []
    for lies_in, own in hosts.items():
        shares, factor = shares_of([weights[place] for place in own], [factors[place] for place in own])
        sources.append(Fold([counted[place] for place in own], shares) if lies_in is None else slots[lies_in])
        totals.append((sum(weights[place] for place in own), factor))
    return sources, [weight for weight, _ in totals], [factor for _, factor in totals]
