"""When is training over: a pure rule fed with the same numbers by every worker, so all stop in one round."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CHECK_ROUNDS = 100  # between two looks at the loss inside a pass; a pass's end is always a look


@dataclass
class Stopping:
    """Ends a run at ``steps`` rounds, ``epochs`` passes, a loss of ``until_loss`` or no gain in ``patience`` looks.

    A look is the mean loss over all samples since the look before. Looks come at the end of each pass over
    the training loader and every CHECK_ROUNDS rounds within it.
    """

    steps: int | None = None
    epochs: int | None = None
    until_loss: float | None = None
    patience: int | None = None
    best: float = field(default=math.inf)
    looks_without_gain: int = 0

    @property
    def needs_loss(self) -> bool:
        return self.until_loss is not None or self.patience is not None

    def after_round(self, number: int) -> str | None:
        """The reason to end after round ``number``, or None."""
        if self.steps is not None and number >= self.steps:
            return f"{number} {'step' if number == 1 else 'steps'} done"
        return None

    def after_pass(self, number: int) -> str | None:
        """The reason to end after pass ``number`` over the training loader, or None."""
        if self.epochs is not None and number >= self.epochs:
            return f"{number} {'epoch' if number == 1 else 'epochs'} done"
        return None

    def look(self, loss: float) -> str | None:
        """Take in one look at the mean loss; the reason to end, or None."""
        if self.until_loss is not None and loss <= self.until_loss:
            return f"loss {loss:.6g} reached {self.until_loss:g}"
        if self.patience is not None:
            if loss < self.best:
                self.best, self.looks_without_gain = loss, 0
            else:
                self.looks_without_gain += 1
                if self.looks_without_gain >= self.patience:
                    return f"no better loss than {self.best:.6g} in {self.patience} looks"
        return None
