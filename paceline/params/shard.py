"""A shard: a range of the parameters that one process folds and steps.

    fold: g = sum over contributors w of  (n_w / N) g_w,   N = sum of n_w      (Li et al., OSDI 2014)
    step: the user's own optimizer over the pieces, with the gradient g

n_w is the number of samples behind worker w's gradient: with unequal batches the plain mean would be wrong. The
sum runs in rank order for every value, so the number of shards does not change a bit of the result. Knows
memory and tensors, not processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import optim

from paceline.params.optimizers import Group
from paceline.params.state import State
from paceline.params.table import DTYPES, Table
from paceline.protocol.partition import Piece

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums of 16-bit gradients run in these
_NORM_DTYPE = _WIDE | {torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent pieces of one dtype: they fold in one go. ``sum`` and ``gradient`` are one tensor but for 16 bits."""

    dtype: str
    start: int
    stop: int
    sum: torch.Tensor
    gradient: torch.Tensor


class Shard:
    """Steps ``pieces`` of the parameter ``vectors`` (by dtype, shared) with ``make(groups)``, a clone.

    ``whole``: every piece is a whole parameter and is stepped in its own shape.
    """

    def __init__(
        self,
        table: Table,
        pieces: Sequence[Piece],
        vectors: Mapping[str, torch.Tensor],
        state: State,
        make: Callable[[list[Group]], optim.Optimizer],
        groups: list[Group],
        *,
        whole: bool,
    ) -> None:
        self._table, self._pieces, self._state, self._whole = table, tuple(pieces), state, whole
        self._runs = _runs(table, self._pieces)
        self._tensors: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        stepped: list[Group] = [{**group, "params": []} for group in groups]
        for piece in self._pieces:
            entry = table.entries[piece.param]
            at = entry.offset + piece.start
            run = next(run for run in self._runs if run.dtype == entry.dtype and run.start <= at < run.stop)
            tensor = vectors[entry.dtype][at : entry.offset + piece.stop]
            gradient = run.gradient[at - run.start : entry.offset + piece.stop - run.start]
            if whole:
                tensor = tensor.as_strided(entry.shape, entry.stride, tensor.storage_offset())
                gradient = gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset())
            self._tensors.append(tensor)
            self._gradients.append(gradient)
            stepped[entry.group]["params"].append(tensor)
        self._vectors = vectors
        self._folded = self._gradients
        self._aliases: dict[int, list[torch.Tensor]] = {}  # address of a gradient -> the pieces' ranges of it
        self._optimizer = make(stepped)
        self._saved = 0  # pieces whose state lies in shared memory
        self._settings = [dict(group) for group in groups]
        self._rate = 1.0

    @property
    def values(self) -> int:
        return sum(piece.stop - piece.start for piece in self._pieces)

    def resume(self) -> None:
        """Take up the state as others have left it; to be called before a step whenever somebody else may have
        stepped these pieces since."""
        for piece, tensor in zip(self._pieces, self._tensors, strict=True):
            state = self._state.load(piece, whole=self._whole)
            if state:
                self._optimizer.state[tensor] = state
        self._saved = len(self._optimizer.state)

    def follow(self) -> None:
        """As ``resume``, for a shard that others step too but whose pieces are always the same: what is an alias of
        the shared memory already is not looked at again."""
        if self._saved < len(self._tensors) or self._state.has_numbers:
            self.resume()

    def forget(self) -> None:
        """The shared state was replaced: hold on to none of it."""
        self._optimizer.state.clear()
        self._saved = 0

    def copy_to(self, vectors: Mapping[str, torch.Tensor]) -> None:
        """Copy this shard's parameters into flat vectors (by dtype, whole) of the same layout."""
        for run in self._runs:
            vectors[run.dtype][run.start : run.stop].copy_(self._vectors[run.dtype][run.start : run.stop])

    def fold(self, gradients: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> None:
        """Fold the contributors' flat gradients (by dtype, whole vectors) over this shard's range."""
        if len(gradients) == 1:
            self._folded = self._alias(gradients[0])
            return
        self._folded = self._gradients
        total = sum(weights)
        shares = [weight / total for weight in weights]
        for run in self._runs:
            sources = [gradient[run.dtype][run.start : run.stop] for gradient in gradients]
            if run.sum is run.gradient:
                torch.mul(sources[0], shares[0], out=run.sum)
            else:
                run.sum.copy_(sources[0]).mul_(shares[0])
            for source, share in zip(sources[1:], shares[1:], strict=True):
                run.sum.add_(source, alpha=share)
            if run.sum is not run.gradient:
                run.gradient.copy_(run.sum)

    def fold_compensated(
        self, gradient: Mapping[str, torch.Tensor], computed_on: Mapping[str, torch.Tensor], strength: float
    ) -> None:
        """Fold g + ``strength`` g^2 (w - w_c) of one worker; w_c are the parameters that g was computed on."""
        self._folded = self._gradients
        for run in self._runs:
            g = gradient[run.dtype][run.start : run.stop]
            drift = self._vectors[run.dtype][run.start : run.stop] - computed_on[run.dtype][run.start : run.stop]
            torch.addcmul(g, g * g, drift, value=strength, out=run.gradient)

    def _alias(self, source: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The pieces' ranges of a gradient, where it lies."""
        address = next(iter(source.values())).data_ptr()
        known = self._aliases.get(address)
        if known is None:
            known = []
            for piece in self._pieces:
                entry = self._table.entries[piece.param]
                gradient = source[entry.dtype][entry.offset + piece.start : entry.offset + piece.stop]
                if self._whole:
                    gradient = gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset())
                known.append(gradient)
            self._aliases[address] = known
        return known

    def norm(self, chosen: bytes | None, order: float) -> float:
        """Of what was folded: the sum of |g|^order over the chosen parameters, or the maximum for infinity."""
        norms = [
            torch.linalg.vector_norm(gradient, order, dtype=_NORM_DTYPE.get(gradient.dtype, gradient.dtype))
            for piece, gradient in zip(self._pieces, self._folded, strict=True)
            if chosen is None or chosen[piece.param]
        ]
        values = [float(norm) for norm in norms]
        if order == math.inf:
            return max(values, default=0.0)
        return math.fsum(value**order for value in values)

    def step(self, settings: Sequence[Group] | None, has_gradient: bytes | None, *, rate: float = 1.0) -> None:
        """One optimizer step with what was folded.

        ``settings`` replaces the groups' hyper-parameters (None: unchanged). ``has_gradient[i]`` tells whether anyone
        had a gradient for parameter i: one without is not stepped, as in torch (None: all have). ``rate`` multiplies
        the learning rate of this step.
        """
        if settings is not None:
            for known, new in zip(self._settings, settings, strict=True):
                known.update(new)
        if settings is not None or rate != self._rate:
            self._rate = rate
            for group, known in zip(self._optimizer.param_groups, self._settings, strict=True):
                group.update(known if rate == 1.0 or "lr" not in known else known | {"lr": known["lr"] * rate})
        for piece, tensor, gradient in zip(self._pieces, self._tensors, self._folded, strict=True):
            tensor.grad = gradient if has_gradient is None or has_gradient[piece.param] else None
        if self._saved < len(self._tensors):
            self._begin_momentum()
        self._optimizer.step()
        if self._whole or len(self._optimizer.state) != self._saved:
            for piece, tensor in zip(self._pieces, self._tensors, strict=True):
                if tensor in self._optimizer.state:
                    self._state.save(piece, self._optimizer.state[tensor], whole=self._whole)
            self._saved = len(self._optimizer.state)

    def _begin_momentum(self) -> None:
        """torch's fused SGD wants momentum for all of its tensors or for none; a layer first used late has none.

        Zeros are what the first step would make of it (no dampening: see optimizers.choose_fused).
        """
        for group in self._optimizer.param_groups:
            if not isinstance(self._optimizer, optim.SGD) or not (group["fused"] and group["momentum"]):
                continue
            for tensor in group["params"]:
                if tensor.grad is not None and self._optimizer.state[tensor].get("momentum_buffer") is None:
                    self._optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)


def _runs(table: Table, pieces: Sequence[Piece]) -> list[_Run]:
    spans: list[tuple[str, int, int]] = []
    ends: dict[str, int] = {}
    for piece in pieces:
        entry = table.entries[piece.param]
        start, stop = entry.offset + piece.start, entry.offset + piece.stop
        last = ends.get(entry.dtype)
        if last is not None and spans[last][2] == start:
            spans[last] = (entry.dtype, spans[last][1], stop)
        else:
            ends[entry.dtype] = len(spans)
            spans.append((entry.dtype, start, stop))
    runs = []
    for dtype, start, stop in spans:
        gradient = torch.zeros(stop - start, dtype=DTYPES[dtype])
        wide = _WIDE.get(gradient.dtype)
        runs.append(_Run(dtype, start, stop, gradient.to(wide) if wide else gradient, gradient))
    return runs
