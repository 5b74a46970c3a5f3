"""Where a resumed run begins: what a checkpoint's ``state`` says, put on the board before any process is there."""

from __future__ import annotations

from typing import Any

from paceline.config import Job, Local, Quorum, Sync
from paceline.engine.worker.position import dealt_alike, key_of
from paceline.transport.board import Board


def last_key(state: dict[str, Any], job: Job) -> int:
    """The last round, or step, that metrics were told of."""
    if isinstance(job.pace, Sync | Local | Quorum):
        return int(state["exchanges"][0]["number"]) if state["exchanges"] else 0
    return int(state["step"])


def fill_board(state: dict[str, Any], board: Board, job: Job) -> None:
    """Passes that lie behind, how far each worker is into its own, and what the stop rules have found."""
    for loader, known in enumerate(state["loaders"]):
        passes = known["passes"]
        # Where data are dealt otherwise than then, the rest of the pass is dealt anew.
        alike = dealt_alike(state, known, job)
        for worker in range(job.workers):
            board.passes(loader)[worker] = passes
            if alike and known["done"][worker]:
                board.places[2 * worker] = key_of(loader, passes)
                board.places[2 * worker + 1] = known["done"][worker]
        if alike and any(known["done"]):  # whoever dies before it begins that pass has its part all the same
            board.shares.settle(loader, passes, range(job.workers))
        board.decided[loader] = min(known["decided"], passes)
        board.evaluated[loader] = known["evaluated"]
        board.trained[loader] = known["trained"]
        board.drained[loader] = passes
    board.accounts.restore(state["accounts"])
    board.accounts.steps = float(state["step"] * job.workers)
    board.journal.commit()
