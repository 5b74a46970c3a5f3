"""Where a resumed run begins: what a checkpoint's ``state`` says, put on the board before any process is there."""

from __future__ import annotations

from typing import Any

from paceline.config import Job, Local, Quorum, Sync
from paceline.transport.board import Board


def last_key(state: dict[str, Any], job: Job) -> int:
    """The last round, or step, that metrics were told of."""
    if isinstance(job.pace, Sync | Local | Quorum):
        return int(state["exchanges"][0]["number"]) if state["exchanges"] else 0
    return int(state["step"])


def fill_board(state: dict[str, Any], board: Board, job: Job) -> None:
    """Passes that lie behind, how far each worker is into its own, and what the stop rules have found."""
    same = (state["workers"], state["assign"]) == (board.workers, job.assign)
    for loader, known in enumerate(state["loaders"]):
        # Where data are dealt otherwise than then all are in the first pass that is not over, whose rest is dealt anew.
        passes = known["passes"] if same else [min(known["passes"])] * board.workers
        for worker in range(board.workers):
            board.passes(loader)[worker] = passes[worker]
            if same and known["done"][worker]:
                board.places[2 * worker] = (loader + 1) << 32 | passes[worker]
                board.places[2 * worker + 1] = known["done"][worker]
        board.decided[loader] = min(known["decided"], min(passes))
        board.evaluated[loader] = known["evaluated"]
        board.drained[loader] = min(passes)
    board.accounts.restore(state["accounts"])
    board.accounts.steps = float(state["step"] * board.workers)
    board.journal.commit()
