"""A shard: a range of the parameters that one process folds and steps.

    fold: g = sum over contributors w of  (n_w / N) g_w,   N = sum of n_w      (Li et al., OSDI 2014)
    step: the user's own optimizer over the pieces, with the gradient g

n_w is the number of samples behind worker w's gradient: with unequal batches the plain mean would be wrong. The
sum runs in rank order for every value, so the number of shards does not change a bit of the result. Pieces of
parameters with sparse rows are tables [rows, row] of their own, folded and stepped with sparse gradients
(params/rows.py): no work or memory of a step grows with such a table. Knows memory and tensors, not processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import optim

from paceline.params import optimizers, rows
from paceline.params.optimizers import Group
from paceline.params.state import State
from paceline.params.table import Table, vector_dtype
from paceline.protocol.partition import Piece

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums of 16-bit gradients run in these
_NORM_DTYPE = _WIDE | {torch.float32: torch.float64}


class Pushed(Protocol):
    """A worker's whole gradient, as it lies in its slot: the table's flat vectors, and for each parameter with sparse
    rows the numbers of those that it has (params/rows.py)."""

    gradient: dict[str, torch.Tensor]
    rows: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent dense pieces: they fold in one go. ``sum`` and ``gradient`` are one tensor but for 16 bits."""

    vector: str
    start: int
    stop: int
    sum: torch.Tensor
    gradient: torch.Tensor


class Shard:
    """Steps ``pieces`` of the parameter ``vectors`` (the table's, shared) with ``make(groups)``, a clone.

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
        self._gradients: list[torch.Tensor] = []  # of a piece with rows: empty, it has one when it is folded
        self._by_rows = [i for i, piece in enumerate(self._pieces) if table.entries[piece.param].row]
        stepped: list[Group] = [{**group, "params": []} for group in groups]
        for piece in self._pieces:
            entry = table.entries[piece.param]
            at = entry.offset + piece.start
            if entry.row:
                stop = entry.offset + min(piece.stop, entry.size)
                tensor = vectors[entry.vector][at:stop].view(-1, entry.row)
                gradient = tensor.new_zeros(0)
            else:
                run = next(run for run in self._runs if run.vector == entry.vector and run.start <= at < run.stop)
                tensor = vectors[entry.vector][at : entry.offset + piece.stop]
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
        self._step = optimizers.bare_step(self._optimizer)
        self._saved = 0  # pieces whose state lies in shared memory
        self._settings = [dict(group) for group in groups]
        self._rate = 1.0

    @property
    def values(self) -> int:
        return sum(piece.stop - piece.start for piece in self._pieces)

    def resume(self) -> None:
        """Take up the state as others have left it; to be called before a step whenever somebody else may have
        stepped these pieces since."""
        if self._state.is_empty:
            return
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
        """Copy this shard's parameters into whole flat vectors of the same layout; not those with sparse rows."""
        for run in self._runs:
            vectors[run.vector][run.start : run.stop].copy_(self._vectors[run.vector][run.start : run.stop])

    def fold(self, sources: Sequence[Pushed], weights: Sequence[float]) -> None:
        """Fold the contributors' gradients over this shard's range."""
        if len(sources) == 1:
            self._folded = self._with_rows(self._alias(sources[0].gradient), sources, [1.0])
            return
        total = sum(weights)
        shares = [weight / total for weight in weights]
        self._folded = self._with_rows(self._gradients, sources, shares)
        for run in self._runs:
            gradients = [source.gradient[run.vector][run.start : run.stop] for source in sources]
            if run.sum is run.gradient:
                torch.mul(gradients[0], shares[0], out=run.sum)
            else:
                run.sum.copy_(gradients[0]).mul_(shares[0])
            for gradient, share in zip(gradients[1:], shares[1:], strict=True):
                run.sum.add_(gradient, alpha=share)
            if run.sum is not run.gradient:
                run.gradient.copy_(run.sum)

    def fold_compensated(self, source: Pushed, computed_on: Mapping[str, torch.Tensor], strength: float) -> None:
        """Fold g + ``strength`` g^2 (w - w_c) of one worker; w_c are the parameters that g was computed on.

        Of sparse rows g is taken as it is: workers compute on the shared rows, so there is no w_c of them.
        """
        self._folded = self._with_rows(self._gradients, [source], [1.0])
        for run in self._runs:
            g = source.gradient[run.vector][run.start : run.stop]
            drift = self._vectors[run.vector][run.start : run.stop] - computed_on[run.vector][run.start : run.stop]
            torch.addcmul(g, g * g, drift, value=strength, out=run.gradient)

    def _with_rows(
        self, dense: list[torch.Tensor], sources: Sequence[Pushed], shares: Sequence[float]
    ) -> list[torch.Tensor]:
        """The pieces' gradients: those of ``dense``, and in the places of pieces with rows these folded."""
        if not self._by_rows:
            return dense
        folded = list(dense)
        for index in self._by_rows:
            piece, tensor = self._pieces[index], self._tensors[index]
            entry = self._table.entries[piece.param]
            first = piece.start // entry.row
            given = [
                rows.read(
                    source.rows[piece.param],
                    source.gradient[entry.vector][entry.offset : entry.offset + entry.size],
                    entry.row,
                    first,
                    first + len(tensor),
                )
                for source in sources
            ]
            wide = _WIDE.get(tensor.dtype, tensor.dtype)
            mean = given[0] if len(given) == 1 else rows.fold(given, shares, wide)
            folded[index] = rows.gradient_of(mean, tensor.shape)
        return folded

    def _alias(self, source: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The pieces' ranges of a gradient, where it lies."""
        address = next(iter(source.values())).data_ptr()
        known = self._aliases.get(address)
        if known is None:
            known = []
            for piece in self._pieces:
                entry = self._table.entries[piece.param]
                gradient = source[entry.vector][entry.offset + piece.start : entry.offset + piece.stop]
                if self._whole and not entry.row:
                    gradient = gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset())
                known.append(gradient)
            self._aliases[address] = known
        return known

    def norm(self, chosen: bytes | None, order: float) -> float:
        """Of what was folded: the sum of |g|^order over the chosen parameters, or the maximum for infinity."""
        flat = [
            gradient.coalesce().values() if gradient.is_sparse else gradient
            for piece, gradient in zip(self._pieces, self._folded, strict=True)
            if chosen is None or chosen[piece.param]
        ]
        norms = [
            torch.linalg.vector_norm(values, order, dtype=_NORM_DTYPE.get(values.dtype, values.dtype))
            for values in flat
            if values.numel()
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
        with rows.unchecked() if self._by_rows else nullcontext():
            self._step()
        if self._whole or self._state.has_numbers or len(self._optimizer.state) != self._saved:
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
        if entry.row:
            continue
        start, stop = entry.offset + piece.start, entry.offset + piece.stop
        last = ends.get(entry.vector)
        if last is not None and spans[last][2] == start:
            spans[last] = (entry.vector, spans[last][1], stop)
        else:
            ends[entry.vector] = len(spans)
            spans.append((entry.vector, start, stop))
    runs = []
    for vector, start, stop in spans:
        gradient = torch.zeros(stop - start, dtype=vector_dtype(vector))
        wide = _WIDE.get(gradient.dtype)
        runs.append(_Run(vector, start, stop, gradient.to(wide) if wide else gradient, gradient))
    return runs
