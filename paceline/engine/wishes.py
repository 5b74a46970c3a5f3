"""What is said to a wish for other numbers of workers: why not, or what is going to happen."""

from __future__ import annotations

from paceline.config import Job, Quorum
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.messages import Failed, Scale, Scaled


class Wishes:
    """Of the run of ``job``. ``elsewhere``: somebody else started its workers; ``epoch``: the one worker 0 is in."""

    def __init__(self, job: Job, coordinator: Coordinator, *, elsewhere: bool) -> None:
        self._job, self._coordinator, self._elsewhere = job, coordinator, elsewhere
        self.epoch = 0

    def answer(self, wish: Scale) -> Scaled:
        """Changes nothing."""
        if wish.workers is None:
            return Scaled((f"the run has {_count(self._coordinator.wanted)}",))
        refused = self._coordinator.refusal(wish.workers) or self._refusal(wish.workers)
        if refused is not None:
            return Scaled(kind=refused.kind, what=refused.what, why=refused.why, fix=refused.fix)
        return Scaled(tuple(self._told(wish.workers)))

    def _refusal(self, workers: int) -> Failed | None:
        job, pace = self._job, self._job.pace
        if self._elsewhere:
            return Failed("UsageError", "a run that torchrun has started has the workers that torchrun started")
        if job.data == "served":
            why = "worker 0 reads for those that were there when the run was started"
            return Failed("UsageError", "a run with --data served has the workers it was started with", why)
        if workers > job.places:
            fix = f"{job.places} at most, or start the run with --max-workers {workers}"
            return Failed("UsageError", f"workers is {workers}; the run has room for {job.places}", fix=fix)
        if isinstance(pace, Quorum) and workers < pace.count:
            what = f"workers is {workers}; pace {pace} waits for {pace.count} pushes a round"
            return Failed("UsageError", what, fix=f"{pace.count} or more")
        return None

    def _told(self, workers: int) -> list[str]:
        before = self._coordinator.wanted
        if workers == before:
            return [f"the run has {_count(workers)}"]
        told = [f"{_count(workers)} instead of {before}"]
        if workers > before:
            added = _names(range(before, workers))
            when = "as soon as it has caught up" if workers == before + 1 else "as soon as they have caught up"
            if self._job.assign != "lease" and self._job.data == "shared":
                when += ", on its part of the next epoch" if workers == before + 1 else ", on parts of the next epoch"
            return [*told, f"{added} {'trains' if workers == before + 1 else 'train'} with the others {when}"]
        gone = _names(range(workers, before))
        leaves = "leaves" if workers == before - 1 else "leave"
        when = "after its step in progress" if self._job.assign == "lease" else f"at the end of epoch {self.epoch}"
        return [*told, f"{gone} {leaves} {when}"]


def _count(workers: int) -> str:
    return f"{workers} worker" if workers == 1 else f"{workers} workers"


def _names(ranks: range) -> str:
    if len(ranks) == 1:
        return f"worker {ranks[0]}"
    return f"workers {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"
