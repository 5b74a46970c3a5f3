"""How far all workers are into their data: told to a checkpoint, and taken up by a run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import msgspec

from paceline.config import Job
from paceline.data.part import Part
from paceline.data.trained import Trained
from paceline.engine.context import Context
from paceline.engine.worker.leases import Leases
from paceline.protocol.deals import ALL, Dealt
from paceline.protocol.rounds import LEFT


def key_of(loader: int, number: int, deal: int = 0) -> int:
    """Names a deal of a pass over a loader, in one word of the board that is never 0."""
    return loader + 1 << 48 | (deal & 0xFFFF) << 32 | number


def loader_of(key: int) -> int:
    return (key >> 48) - 1


def number_of(key: int) -> int:
    return key & 0xFFFFFFFF


def tell(context: Context, loaders: int, leases: Mapping[int, Leases], trained: Set[int], part: Part) -> dict[str, Any]:
    """Under the run's lock, when every push that counts is settled. ``trained``: the loaders that are trained on;
    ``part``: with what a resumed run had trained on before."""
    board, job = context.board, context.job
    workers = [w for w in range(board.width) if board.gone[w] != LEFT]
    told = []
    for loader in range(loaders):
        passes = list(board.passes(loader))
        # Who waits for the others at the end of a pass is still in it, with nothing left to do.
        now = min((passes[w] for w in workers), default=0)
        # Whose places need no telling are those that never change.
        everybody = tuple(range(job.workers) if job.data != "shared" else workers)
        dealt = board.shares.dealt(loader, now) or Dealt(0, 0, everybody, {})
        sharers = dealt.sharers_of(dealt.newest)
        before = replace(part, before=dealt.before(dealt.newest)).trained_in(loader, now)
        known = {
            "passes": now,
            "before": [msgspec.to_builtins(one) for one in before],  # of each the next dealt the rest
            # By part, of those that the rest is dealt in.
            "done": [0 if loader in leases else _done(context, loader, now, dealt, w) for w in sharers],
            "ledger": leases[loader].left() if loader in leases else None,
            "decided": board.decided[loader],
            "evaluated": board.evaluated[loader],
            "trained": loader in trained,
        }
        told.append(known)
    known_of_all = {"workers": len(workers), "assign": job.assign, "seed": job.seed}
    return known_of_all | {"loaders": told, "accounts": board.accounts.words()}


def _done(context: Context, loader: int, number: int, dealt: Dealt, worker: int) -> int:
    """How many batches of its part in the newest deal a worker has trained on."""
    board = context.board
    if worker in dealt.outs:
        return dealt.outs[worker][1]
    passes = board.passes(loader)[worker]
    if passes > number and board.look(loader, passes, worker)[2]:  # it may have had nothing to evaluate
        return ALL
    return done_in(board.places, worker, key_of(loader, number, dealt.newest))


def done_in(places: Sequence[int], worker: int, key: int) -> int:
    """The same, by the board's column ``places``."""
    return places[2 * worker + 1] if places[2 * worker] == key else 0


def dealt_alike(state: Mapping[str, Any], known: Mapping[str, Any], job: Job) -> bool:
    """Was the open pass over a loader dealt as this job deals it?"""
    return (len(known["done"]), state["assign"]) == (job.workers, job.assign)


def trained_before(state: Mapping[str, Any], job: Job) -> tuple[tuple[Trained, ...], ...]:
    """What a run that is resumed had trained on, by loader; in what was dealt last, if this job deals otherwise."""
    found = []
    for known in state["loaders"] if job.data != "own" else ():
        epoch, ledger, workers = known["passes"], known["ledger"], len(known["done"])
        trained = msgspec.convert(known.get("before", ()), tuple[Trained, ...])
        if ledger is not None and job.assign != "lease":
            if ledger[0] == epoch:
                last = Trained(epoch, workers, "lease", state["seed"], (), ledger[1], tuple(ledger[2]), len(trained))
                trained += (last,)
        elif ledger is None and not dealt_alike(state, known, job):
            done = tuple(known["done"])
            trained += (Trained(epoch, workers, state["assign"], state["seed"], done, deal=len(trained)),)
        found.append(trained)
    return tuple(found)
