"""What a script uses and has not given to ``run.wrap``, found when it has come to its end: nobody pays for it before.

Said is only what is certain. A script that asks for its rank, or for the number of workers, may divide the data by
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from paceline.engine.worker.progress import Progress


class LeftOut:
    """``asked_rank``: has the script asked which worker it is? ``told``: what was found where it runs, elsewhere."""

    def __init__(self, *, asked_rank: bool = False, told: Sequence[str] = ()) -> None:
        self.asked_rank = asked_rank
        self._told = told
        self._models: list[tuple[nn.Module, list[int]]] = []  # with how often each parameter had been written to

    def wrapped(self, model: nn.Module) -> None:
        self._models.append((model, [parameter._version for parameter in model.parameters()]))

    def found(self, exchanges: Sequence[Any], loaders: int, progress: Progress) -> list[str]:
        """What there is to say, in sentences. So many ``loaders`` are wrapped."""
        return [*self._told, *self.of_models(exchanges), *self._of_loaders(loaders, progress)]

    def of_models(self, exchanges: Sequence[Any]) -> list[str]:
        """What was trained in this process alone."""
        told = []
        shared = {id(parameter) for exchange in exchanges for parameter in exchange.parameters}
        for model, versions in self._models:
            before = zip(model.named_parameters(), versions, strict=False)
            own = [
                name
                for (name, p), version in before
                if p.requires_grad and p.grad is not None and id(p) not in shared and p._version != version
            ]
            if own:
                more = f" and {len(own) - 1} more" if len(own) > 1 else ""
                told.append(
                    f"{own[0]}{more} of a wrapped model {'were' if more else 'was'} trained by an optimizer that is "
                    "not wrapped: each worker trained its own; give the optimizer to run.wrap too"
                )
        return told

    def _of_loaders(self, loaders: int, progress: Progress) -> list[str]:
        if progress.own_steps and loaders and not progress.batches:
            return [
                "of the wrapped loader no batch was read, so each worker read all of the data: "
                "iterate over what run.wrap returns"
            ]
        if progress.own_steps and not loaders and not self.asked_rank:
            return [
                "no loader was given to run.wrap, so each worker trained on whatever its script read, and no data were "
                "dealt out: wrap the loader"
            ]
        return []
