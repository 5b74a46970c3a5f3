"""What a worker's script does again until it is where the worker before it in its place was: ghost batches.

A newcomer takes the place of a worker that has died: it runs the script from the top, and each pass that its place has
behind it has one batch, of which nothing stays (docs/decisions/0009). So does a worker of a run that is resumed, and
with it all others. One that comes to a place that was LEFT has behind it what all others have (docs/decisions/0012).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.engine.checkpoint.snapshot import Resumed
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.position import loader_of, number_of
from paceline.protocol.rounds import LEFT
from paceline.transport.board import COLLECTIVES

_EVALUATED, _TRAINED = 1, 2  # what a pass counts as that is caught up with


class CatchingUp:
    """``behind`` is what lies before the board's own count of passes, for a process that is no newcomer."""

    def __init__(self, context: Context, exchanges: Sequence[Exchange], *, is_newcomer: bool) -> None:
        self._board, self._rank, self._exchanges = context.board, context.rank, exchanges
        self.resumed = Resumed(context.resume) if context.resume is not None and not is_newcomer else None
        self.joined = not is_newcomer and self.resumed is None  # do the others count with this worker?
        self._behind: dict[int, int] = {}  # loader -> passes that are left to catch up with
        self._done: dict[int, int] = {}  # loader -> passes caught up with
        self._ghosts: dict[int, int] = {}  # loaders whose pass in progress is one to catch up with -> what it counts as
        if self.is_fresh:
            self.look_again()
        elif not self.joined:
            passes = {loader: self._board.passes(loader)[self._rank] for loader in range(COLLECTIVES)}
            self._behind = {loader: count for loader, count in passes.items() if count}
        self._with_ghost = False  # is the batch in hand one that only keeps the script from finding a pass empty?
        self.joined_in: int | None = None  # the loader in whose pass it has joined, while that lasts
        self.last: int | None = None  # the loader of the last pass that was caught up with
        # Sets what the script has of its own to what it was; until the first batch that is not a ghost.
        self._to_take: Callable[[], None] | None = None
        self._is_taken = True
        self.is_to_ask = False  # for what the others' scripts keep

    @property
    def is_behind(self) -> bool:
        """Has this process still to catch up with what the worker before it in its place had done?"""
        return not self.joined and any(map(self._holds, self._behind))

    @property
    def is_repeating(self) -> bool:
        """Does the script do again what was done in its place? Also behind the last pass that it catches up with, if
        somebody had come into the next: that what lies between has been done."""
        return self.is_behind or (not self.joined and self.last is not None and self._had_gone_on())

    def _had_gone_on(self) -> bool:
        if self.resumed is not None:
            return any(map(_is_begun, self.resumed.state["loaders"]))
        if self.is_fresh:
            return True
        key, done = self._board.places[2 * self._rank], self._board.places[2 * self._rank + 1]
        return done > 0 and number_of(key) == self._board.passes(loader_of(key))[self._rank]

    @property
    def is_fresh(self) -> bool:
        """Does this process come to a place that was LEFT? Then nobody waits for it until it joins."""
        return not self.joined and self.resumed is None and self._board.gone[self._rank] == LEFT

    def look_again(self, begins: int | None = None) -> bool:
        """Is this process behind? The others get on while one that nobody waits for catches up.

        ``begins``: a pass over this loader begins, which is to train on or looks so. If it has none left to catch up
        with there, this is the pass to join in: what is left of others lies within it. But an evaluation may be
        anywhere.
        """
        if self.is_fresh:
            others, done = self.others, self._done
            behind = {loader: self.passes_of(others, loader) - done.get(loader, 0) for loader in range(COLLECTIVES)}
            self._behind = {loader: count for loader, count in behind.items() if count > 0}
        if begins is None or begins in self._behind or self._ghosts or self._is_evaluation(begins):
            return self.is_behind
        return not self._is_trained(begins) and any(map(self._is_trained, self._behind))

    def _holds(self, loader: int) -> bool:
        """Are passes over this loader to be caught up with? Evaluations count only where one has nothing to read, and
        by law 4 nobody is held at their ends."""
        return not self._is_evaluation(loader)

    def _is_evaluation(self, loader: int) -> bool:
        return bool(self._board.evaluated[loader]) and not self._is_trained(loader)

    def _is_trained(self, loader: int) -> bool:
        return bool(self._board.trained[loader]) or self._was_trained(loader)

    def passes_of_others(self, loader: int) -> int:
        """The pass that the hindmost of the others is in; all of them where they have left."""
        return self.passes_of(self.others, loader)

    def passes_of(self, workers: Sequence[int], loader: int) -> int:
        passes = self._board.passes(loader)
        return min(passes[worker] for worker in workers) if workers else max(passes)

    @property
    def others(self) -> list[int]:
        """Those who have not left."""
        board = self._board
        return [worker for worker in range(board.width) if worker != self._rank and board.gone[worker] != LEFT]

    @property
    def is_muted(self) -> bool:
        """Is what the script does now not training, but catching up?"""
        return self._with_ghost or bool(self._ghosts)

    @property
    def has_ghost(self) -> bool:
        """Is the batch in hand a ghost, of a pass that is none? What the script does with it concerns nobody else."""
        return self._with_ghost

    @property
    def is_itself(self) -> bool:
        """Has the script what it is to have of its own, so that others may be told?"""
        return self._is_taken and not self._with_ghost and not self.is_to_ask

    def begin(self, loader: int, is_training: bool) -> None:
        """The script begins a pass, and is behind, or has a ghost in hand."""
        trained = self._was_trained(loader)
        counts = not self.joined and loader in self._behind and self._holds(loader) and (not trained or is_training)
        self._ghosts[loader] = (_TRAINED if trained else _EVALUATED) if counts else 0

    def end(self, loader: int) -> tuple[bool, bool]:
        """The script ends a pass. Was it one to catch up with, and does it stand for one that was trained on?"""
        counts = self._ghosts.pop(loader, None)
        if counts:
            self._behind[loader] -= 1
            self._done[loader] = self._done.get(loader, 0) + 1
            if not self._behind[loader]:
                del self._behind[loader]
            self.last = loader
        return counts is not None, counts == _TRAINED

    def _was_trained(self, loader: int) -> bool:
        """Were the passes over this loader that lie behind this worker's place trained on?"""
        if self.resumed is not None:
            return bool(self.resumed.state["loaders"][loader]["trained"])
        board = self._board
        number = self.passes_of_others(loader) if self.is_fresh else board.passes(loader)[self._rank]
        return any(board.look(loader, number, worker)[2] for worker in range(board.width))

    def needs_ghost(self, *, is_first: bool, is_new: bool) -> bool:
        """No batch was left, and ``is_first``: none came before. Is a ghost to keep the script from an empty pass?"""
        self._with_ghost = is_first and (is_new or self._to_take is not None)
        return self._with_ghost

    def lay_ghost(self) -> None:
        """Of a batch that only kept the script from finding a pass empty, nothing stays."""
        self.fetching()  # nothing was fetched at all
        if self._with_ghost:
            if self._to_take is not None:
                self._to_take()
            self.forget_gradients()
        self._with_ghost, self.joined_in = False, None

    def forget_gradients(self) -> None:
        """Those of ghost batches, which are not to be in the next step."""
        for exchange in self._exchanges:
            for parameter in exchange.parameters:
                parameter.grad = None

    # --- what the script has of its own ---

    def will_take(self, take: Callable[[], None]) -> None:
        """Call ``take`` as the script's first batch that is no ghost is fetched."""
        self._to_take, self._is_taken = take, False

    @property
    def is_to_take(self) -> bool:
        """Is there something to take as the next batch is fetched?"""
        return self._to_take is not None and not self._is_taken

    def fetching(self) -> None:
        if self._to_take is not None and not self._is_taken:
            self._to_take()
            self._is_taken = True

    def drawn(self) -> None:
        """The script has a batch that is no ghost: what it does is its own again."""
        self._to_take = None


def _is_begun(known: Mapping[str, Any]) -> bool:
    """Does anything count of the open pass over this loader, as a checkpoint knows it?"""
    if known["ledger"] is None:
        return any(known["done"])
    epoch, _, _, committed = known["ledger"]
    return bool(epoch == known["passes"] and committed)
