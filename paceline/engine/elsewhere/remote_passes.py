"""A worker elsewhere's passes over loaders: what they are is known at home, whose deputy is asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from paceline.config import Job, Quorum
from paceline.data.passes import Pending
from paceline.engine.worker.marks import gradient_marks
from paceline.protocol import remote
from paceline.protocol.deals import Deal


class Asking(Protocol):
    """What passes need of their worker."""

    job: Job

    @property
    def over(self) -> bool: ...

    @property
    def exchanges(self) -> Sequence[Any]: ...

    def ask(self, request: remote.Request) -> Any: ...

    def note(self, note: remote.Note) -> None: ...

    @property
    def status(self) -> remote.Status: ...

    def forget_gradients(self) -> None: ...


class RemotePasses:
    """A ``data.passes.Passes`` that asks the deputy's."""

    def __init__(self, worker: Asking) -> None:
        self._worker = worker
        self.drawing: Callable[[], None] = lambda: None  # called before the script gets a batch
        self.models: list[nn.Module] = []
        self._epochs: list[int] = []
        self._skips: dict[int, int] = {}
        self._draw_ahead: set[int] = set()
        self._leased: dict[int, bool] = {}
        self._verdicts: dict[int, bool] = {}
        self._pending: defaultdict[int, Pending] = defaultdict(Pending)
        self._marks_before: dict[int, int] = {}  # loader -> the gradients' when its pass began
        self._drawn_from: set[int] = set()  # loaders whose pass in progress has had a batch
        self.has_ghost = False  # is the batch in hand one that only keeps the script from finding a pass empty?
        self._marks: tuple[int, object] = (0, None)

    def add(self, loader: int, *, draws_ahead: bool) -> None:
        """One more loader. ``draws_ahead``: batches that it has drawn need not go to the script."""
        if draws_ahead:
            self._draw_ahead.add(loader)

    def take(self, status: remote.Status) -> None:
        """What an answer tells of passes."""
        if status.epochs:
            self._epochs = status.epochs
        for loader, counted in status.verdicts.items():
            self._verdicts[loader] = counted or self._verdicts.get(loader, False)

    @property
    def over(self) -> bool:
        return self._worker.over

    def pending(self, loader: int) -> Pending | None:
        return self._pending[loader] if isinstance(self._worker.job.pace, Quorum) else None

    def begin(self, loader: int, length: int | None) -> bool:
        marks = self._marks_before[loader] = self._count_marks()
        request = remote.Begin(loader, length, self._is_training(), marks)
        is_real, self._skips[loader], self._leased[loader] = self._worker.ask(request)
        self._drawn_from.discard(loader)
        return bool(is_real)

    def epoch(self, loader: int) -> int:
        return self._epochs[loader] if loader < len(self._epochs) else 0

    def skip(self, loader: int) -> int:
        return self._skips[loader]

    def deal(self, loader: int) -> Deal | None:
        deals = self._worker.status.deals
        return deals[loader] if loader < len(deals) else None

    def fetching(self) -> None:
        if self._worker.status.takes:
            self._worker.ask(remote.Fetching())

    def fetched(self, loader: int) -> None:
        self._drawn_from.add(loader)
        self._worker.note(remote.Fetched(loader))

    def border(self) -> None:
        if self._worker.status.saves:
            self._worker.ask(remote.Border())
        else:
            self._worker.note(remote.Border())

    def needs_ghost(self, loader: int) -> bool:
        self.has_ghost = loader not in self._drawn_from and bool(self._worker.ask(remote.NeedsGhost(loader)))
        return self.has_ghost

    def drawn(self, loader: int, samples: int) -> None:
        self.drawing()
        self._worker.note(remote.Drawn(loader, samples))

    def leases(self, loader: int) -> _Leases | None:
        if not self._leased[loader]:
            return None
        return _Leases(self._worker, loader, draws_ahead=loader in self._draw_ahead)

    def more(self, loader: int) -> bool:
        more = bool(self._worker.ask(remote.More(loader)))
        self._skips[loader] = 0  # of a part that nobody has begun
        return more

    def verdict(self, loader: int) -> bool | None:
        return self._verdicts.pop(loader, None)

    def end(self, loader: int) -> None:
        self._lay_ghost()
        self._worker.ask(remote.End(loader, self._is_training(), self._count_marks_of(loader)))

    def _lay_ghost(self) -> None:
        if self.has_ghost:
            self.has_ghost = False
            self._worker.forget_gradients()

    def leave(self, loader: int) -> None:
        self._lay_ghost()
        self._worker.note(remote.Left(loader, self._count_marks_of(loader)))

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and (not self.models or any(model.training for model in self.models))

    def _count_marks_of(self, loader: int) -> int:
        """At the end of a pass."""
        marks = self._count_marks()
        if marks == self._marks_before[loader]:
            self._pending[loader].forget()
        return marks

    def _count_marks(self) -> int:
        """Another number whenever a backward pass has added to a gradient."""
        marks = gradient_marks([p for exchange in self._worker.exchanges for p in exchange.parameters])
        if marks != self._marks[1]:
            self._marks = (self._marks[0] + 1, marks)
        return self._marks[0]


class _Leases:
    """A ``data.passes.Leases``. Each call is a round trip: whose a batch still is, is known at home alone. Where what
    is drawn is the next that the script gets, it is begun with that."""

    def __init__(self, worker: Asking, loader: int, *, draws_ahead: bool) -> None:
        self._worker, self._loader, self._draws_ahead = worker, loader, draws_ahead

    def draw(self, total: int | None, at_least: int = 0) -> int | None:
        request = remote.DrawLease(self._loader, total, at_least, not self._draws_ahead)
        ordinal: int | None = self._worker.ask(request)
        return ordinal

    def has_more(self) -> None:
        """It would be a round trip for each time that a script asks for its loader's ``len``."""

    def drop(self) -> None:
        self._worker.ask(remote.DropLease(self._loader))

    def begin(self) -> bool:
        return not self._draws_ahead or bool(self._worker.ask(remote.BeginLease(self._loader)))
