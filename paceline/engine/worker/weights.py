"""How many samples are behind what an optimizer's next push brings: by that it weighs.

Those read since its last step, without those whose gradients the script has dropped. ``optimizer.zero_grad()`` drops
the gradients of all that was read before the batch in hand. Of the batch in hand a backward pass may have been, and be
dropped, or be to come: that is known when the next batch is read, by whether a gradient has come since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from paceline.engine.worker.marks import gradient_marks


class Weights:
    """The samples that were read, and from where on they count for each exchange."""

    def __init__(self) -> None:
        self.samples = 0  # read so far, evaluations excepted
        self._in_hand: dict[int, tuple[int, int]] = {}  # loader -> (samples read before its batch, samples of that)
        self._since: list[int] = []  # by exchange: so many samples were read before those that weigh

    def add_exchange(self) -> None:
        self._since.append(self.samples)

    def drawn(self, loader: int, samples: int) -> None:
        """The script has a batch of a loader in hand."""
        self._in_hand[loader] = (self.samples, samples)
        self.samples += samples

    def put_down(self, loader: int) -> None:
        """A pass is over."""
        self._in_hand.pop(loader, None)

    def unread(self, samples: int) -> None:
        """What was read since there were so many samples was an evaluation: no gradient has it."""
        self.samples = samples
        self._since = [min(since, samples) for since in self._since]

    def of(self, exchange: int) -> int:
        """Samples behind the gradient of an exchange."""
        return self.samples - self._since[exchange]

    def stepped(self, exchange: int) -> None:
        self._since[exchange] = self.samples

    def dropped(self, exchange: int, *, in_hand: bool) -> None:
        """The script has dropped its gradient. ``in_hand``: with that of the batches in hand."""
        since, kept = self._since[exchange], 0
        if not in_hand:
            kept = sum(samples for before, samples in self._in_hand.values() if before >= since)
        self._since[exchange] = max(since, self.samples - kept)


class Zeroing:
    """Hears where the script drops gradients, and tells ``Weights.dropped`` of it, or who has those."""

    def __init__(self, exchanges: Sequence[Any], tell: Callable[[int, bool], None]) -> None:
        self._exchanges, self._tell = exchanges, tell
        self._marks: dict[int, object] = {}  # by exchange that was zeroed with this batch in hand: its gradients' then

    def zeroed(self, exchange: int) -> None:
        """The gradients of an exchange have just been dropped."""
        self._tell(exchange, False)
        self._marks[exchange] = gradient_marks(self._exchanges[exchange].parameters)

    def zeroed_in(self, model: nn.Module) -> None:
        """Those of a model have: of exchanges that have no others."""
        given = {id(parameter) for parameter in model.parameters()}
        for index, exchange in enumerate(self._exchanges):
            if all(id(parameter) in given for parameter in exchange.parameters):
                self.zeroed(index)

    def stepped(self, exchange: int) -> None:
        self._marks.pop(exchange, None)

    def drawing(self) -> None:
        """The script is about to get another batch."""
        while self._marks:
            exchange, marks = self._marks.popitem()
            if gradient_marks(self._exchanges[exchange].parameters) == marks:
                self._tell(exchange, True)
