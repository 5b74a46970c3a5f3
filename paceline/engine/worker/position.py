"""How far all workers are into their data: told to a checkpoint, and taken up by a run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from paceline.config import Job
from paceline.data.trained import ALL, Trained
from paceline.engine.context import Context
from paceline.engine.worker.leases import Leases
from paceline.protocol.rounds import LEFT


def key_of(loader: int, number: int) -> int:
    """Names a pass over a loader, in one word of the board that is never 0."""
    return loader + 1 << 32 | number


def loader_of(key: int) -> int:
    return (key >> 32) - 1


def tell(context: Context, loaders: int, leases: Mapping[int, Leases], trained: Set[int]) -> dict[str, Any]:
    """Under the run's lock, when every push that counts is settled. ``trained``: the loaders that are trained on."""
    board, job = context.board, context.job
    workers = [w for w in range(board.width) if board.gone[w] != LEFT]
    told = []
    for loader in range(loaders):
        passes = list(board.passes(loader))
        # Who waits for the others at the end of a pass is still in it, with nothing left to do.
        now = min((passes[w] for w in workers), default=0)
        # Whose places need no telling are those that never change.
        sharers = range(job.workers) if job.data != "shared" else board.sharers(loader, now) or workers
        done = [0] * len(sharers)
        for part, w in enumerate(sharers) if loader not in leases else ():
            if passes[w] > now and board.look(loader, passes[w], w)[2]:  # it may have had nothing to evaluate
                done[part] = ALL
            elif board.places[2 * w] == key_of(loader, now):
                done[part] = board.places[2 * w + 1]
        known = {
            "passes": now,
            "done": done,  # by part, of those that the pass is dealt in
            "ledger": leases[loader].left() if loader in leases else None,
            "decided": board.decided[loader],
            "evaluated": board.evaluated[loader],
            "trained": loader in trained,
        }
        told.append(known)
    dealt = {"workers": len(workers), "assign": job.assign, "seed": job.seed}
    return dealt | {"loaders": told, "accounts": board.accounts.words()}


def dealt_alike(state: Mapping[str, Any], known: Mapping[str, Any], job: Job) -> bool:
    """Was the open pass over a loader dealt as this job deals it?"""
    return (len(known["done"]), state["assign"]) == (job.workers, job.assign)


def trained_before(state: Mapping[str, Any], job: Job) -> tuple[Trained | None, ...]:
    """Where data are dealt otherwise than in the run that is resumed: what it had trained on, by loader."""
    found = []
    for known in state["loaders"]:
        epoch, ledger = known["passes"], known["ledger"]
        trained = None
        if job.data != "own" and (ledger is not None) != (job.assign == "lease") and ledger is not None:
            if ledger[0] == epoch:
                trained = Trained(epoch, len(known["done"]), "lease", state["seed"], (), ledger[1], tuple(ledger[2]))
        elif job.data != "own" and ledger is None and not dealt_alike(state, known, job):
            trained = Trained(epoch, len(known["done"]), state["assign"], state["seed"], tuple(known["done"]))
        found.append(trained)
    return tuple(found)
