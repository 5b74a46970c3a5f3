"""A shard: a range of the parameters that one process folds and steps.

    fold: g = sum over contributors w of  (n_w / N) g_w,   N = sum of n_w      (Li et al., OSDI 2014)
    step: the user's own optimizer over the pieces, with the gradient g

n_w is the number of samples behind worker w's gradient: with unequal batches the plain mean would be wrong. The
sum runs in rank order for every value, so the number of shards does not change a bit of the result. A shard is folded
and stepped chunk by chunk (params/undo.py): what is folded is still in the core's cache when it is stepped. Pieces of
parameters with sparse rows are tables [rows, row] of their own, folded and stepped with sparse gradients
(params/rows.py): no work or memory of a step grows with such a table. Knows memory and tensors, not processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from paceline.params.chunk import Chunk, Target
from paceline.params.fold import Fold, Pushed, Vectors, buffers_for, shares_of, spans_of
from paceline.params.optimizers import Group
from paceline.params.undo import CHUNK_BYTES, Undo, chunks
from paceline.protocol.partition import Piece


class Shard:
    """Steps ``pieces`` of a target: blocks of the grid that its state was laid out for, in order."""

    def __init__(self, target: Target, pieces: Sequence[Piece], chunk_bytes: int = CHUNK_BYTES) -> None:
        self._vectors = target.vectors
        self._spans = spans_of(target.table, pieces)
        cut = chunks(pieces, target.table, target.state.plan, chunk_bytes)
        buffers = buffers_for(target.table, cut)
        self._settings = [dict(group) for group in target.groups]
        self._chunks = [Chunk(target, one, buffers) for one in cut]
        self._fold: Fold | None = None
        self._rate = 1.0
        self.values = sum(piece.stop - piece.start for piece in pieces)

    def resume(self) -> None:
        """Take up the state as others have left it; to be called before a step whenever somebody else may have
        stepped these pieces since."""
        for chunk in self._chunks:
            chunk.resume()

    def follow(self) -> None:
        """As ``resume``; what is an alias of the shared memory already is not looked at again."""
        for chunk in self._chunks:
            chunk.follow()

    def forget(self) -> None:
        """The shared state was replaced: hold on to none of it."""
        for chunk in self._chunks:
            chunk.forget()

    def copy_to(self, vectors: Vectors) -> None:
        """Copy this shard's parameters into whole flat vectors of the same layout; not those with sparse rows."""
        for vector, start, stop in self._spans:
            vectors[vector][start:stop].copy_(self._vectors[vector][start:stop])

    def fold(
        self, sources: Sequence[Pushed | Fold], weights: Sequence[float], factors: Sequence[float] | None = None
    ) -> None:
        """The next step is with the contributors' mean gradient, where there are ``factors`` each times its own. They
        are read when it is stepped."""
        shares, factor = shares_of(weights, factors or [1.0] * len(weights))
        self._fold = Fold(sources, shares, factor=factor)

    def fold_compensated(self, source: Pushed, computed_on: Vectors, strength: float) -> None:
        """The next step is with g + ``strength`` g^2 (w - w_c) of one worker; w_c are the parameters that g was
        computed on.

        Of sparse rows g is taken as it is: workers compute on the shared rows, so there is no w_c of them.
        """
        self._fold = Fold([source], [1.0], computed_on, strength)

    def norm(self, chosen: bytes | None, order: float) -> float:
        """Of the fold: the sum of |g|^order over the chosen parameters, or the maximum for infinity."""
        assert self._fold is not None, "norm before fold"
        norms = [norm for chunk in self._chunks for norm in chunk.norms(self._fold, chosen, order)]
        if order == math.inf:
            return max(norms, default=0.0)
        return math.fsum(norm**order for norm in norms)

    def step(
        self,
        settings: Sequence[Group] | None,
        has_gradient: bytes | None,
        *,
        rate: float = 1.0,
        undo: Undo | None = None,
        number: int = 0,
    ) -> None:
        """One optimizer step with what was folded.

        ``settings`` replaces the groups' hyper-parameters (None: unchanged). ``has_gradient[i]`` tells whether anyone
        had a gradient for parameter i: one without is not stepped, as in torch (None: all have). ``rate`` multiplies
        the learning rate of this step, which is round, or entry, ``number``. With ``undo`` it goes on where a process
        that has died has left it.
        """
        assert self._fold is not None, "step before fold"
        if settings is not None:
            for known, new in zip(self._settings, settings, strict=True):
                known.update(new)
        if settings is not None or rate != self._rate:
            self._rate = rate
            scaled = [g if rate == 1.0 or "lr" not in g else g | {"lr": g["lr"] * rate} for g in self._settings]
            for chunk in self._chunks:
                chunk.set(scaled)
        done, place = undo.begin(number) if undo is not None else 0, 0
        for chunk in self._chunks:
            place = chunk.step(self._fold, has_gradient, undo, done, place, number)
