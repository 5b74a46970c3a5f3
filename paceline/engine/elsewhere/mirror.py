"""A mirror of home's memory of an exchange, on another host: it is stepped there as home steps, to the bit.

    what the others have pushed --Pieces, Follow--> their slots here -> fold, step (the same code, the same order)

So gradients cross the network in both directions, which is as much as they are, and can do so during backward;
parameters do not. Home stays what counts: when a mirror has missed a round it is filled anew.
"""

from __future__ import annotations

import mmap

import torch
from torch import optim

from paceline.engine.elsewhere.mail import Mail
from paceline.engine.exchange.shards import Shards
from paceline.engine.exchange.stepper import Stepper
from paceline.protocol import remote
from paceline.transport.slots import ExchangeMemory, Spec, size_bytes


def arithmetic() -> str:
    """What must be equal for two processes to come to the same bits."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


class Mirror:
    """Of exchange ``index``, for worker ``rank``; ``memory`` is laid out as home's."""

    def __init__(self, spec: Spec, index: int, rank: int) -> None:
        self.memory = ExchangeMemory(mmap.mmap(-1, size_bytes(spec)), spec)
        self._spec, self._index, self._rank = spec, index, rank
        self._stepper: Stepper | None = None

    def expect(self, mail: Mail) -> None:
        """Where parameters and state belong, and what others push."""
        table, memory, index = self._spec.table, self.memory, self._index
        for vector in table.sizes:
            mail.expect(f"parameters/{index}/{vector}", memory.params[vector])
        mail.expect(f"state/{index}", memory.state_bytes())
        for worker, slot in enumerate(memory.slots):
            if worker == self._rank:
                continue
            for vector in table.dense_sizes:
                mail.expect(f"push/{index}/{worker}/{vector}", slot.gradient[vector])
            for param, area in slot.rows.items():
                entry = table.entries[param]
                values = slot.gradient[entry.vector][entry.offset : entry.offset + entry.size]
                mail.expect(f"push/{index}/{worker}/count/{param}", area[:1])
                mail.make_room(f"push/{index}/{worker}/numbers/{param}", area[1:])
                mail.make_room(f"push/{index}/{worker}/values/{param}", values)

    def follow(self, told: remote.Follow, optimizer: optim.Optimizer) -> None:
        """Step this round, of which everything has come."""
        memory = self.memory
        if self._stepper is None:
            shards = Shards(self._spec, memory, type(optimizer), vars(optimizer))
            self._stepper = Stepper(shards, memory, saves=False)  # if this process dies, so does the mirror
        memory.loads[0] = told.loads
        for worker, weight, mask in told.sources:
            slot = memory.slots[worker]
            slot.write_weight(told.number, weight)
            if mask:
                slot.mask[:] = mask
        if told.settings:
            memory.slots[told.sources[0][0]].write_settings(told.settings)
        contributors = tuple(worker for worker, _, _ in told.sources)
        self._stepper.step(told.number, contributors, 0, 1)
