"""What is said to a wish for other numbers of workers or servers: why not, or what is going to happen."""

from __future__ import annotations

from paceline.config import Job, Quorum
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.messages import Failed, Scale, Scaled


class Wishes:
    """Of the run of ``job``. ``epoch``: the one worker 0 is in."""

    def __init__(self, job: Job, coordinator: Coordinator) -> None:
        self._job, self._coordinator = job, coordinator
        self.epoch = 0

    def answer(self, wish: Scale) -> Scaled:
        """Changes nothing."""
        known = self._coordinator
        if wish.workers is None and wish.servers is None:
            servers = [_count(known.wanted_servers, "server")] if known.wanted_servers else []
            return Scaled((f"the run has {' and '.join([_count(known.wanted), *servers])}",))
        refused = known.refusal(wish.workers, wish.servers) or self._refusal(wish)
        if refused is not None:
            return Scaled(kind=refused.kind, what=refused.what, why=refused.why, fix=refused.fix)
        told = [] if wish.workers is None else self._told(wish.workers)
        return Scaled((*told, *([] if wish.servers is None else self._told_of_servers(wish.servers))))

    def _refusal(self, wish: Scale) -> Failed | None:
        job, pace, workers = self._job, self._job.pace, wish.workers
        if wish.servers is not None and job.server_hosts > 1:
            what = f"a run with servers on {job.server_hosts} hosts has the {job.servers} servers it was started with"
            why = "each keeps a part of the parameters that nobody else has"
            return Failed(
                "UsageError", what, why, f"Ctrl-C, and go on from the checkpoint with {_count(wish.servers, 'server')}"
            )
        if wish.servers is not None and wish.servers > job.server_places:
            fix = f"{job.server_places} at most, or start the run with --max-servers {wish.servers}"
            what = f"servers is {wish.servers}; the run has room for {job.server_places}"
            return Failed("UsageError", what, fix=fix)
        if workers is None:
            return None
        if job.engine == "torchrun":
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

    def _told_of_servers(self, servers: int) -> list[str]:
        before = self._coordinator.wanted_servers
        if servers == before:
            return [f"the run has {_count(servers, 'server')}"]
        told = [f"{_count(servers, 'server')} instead of {before}"]
        if servers > before:
            some = _names(range(before, servers), "server")
            return [*told, f"{some} {'steps' if servers == before + 1 else 'step'} a part of the parameters once there"]
        some = _names(range(servers, before), "server")
        return [*told, f"{some} {'leaves' if servers == before - 1 else 'leave'} as soon as the others have taken over"]

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


def _count(number: int, role: str = "worker") -> str:
    return f"{number} {role}" if number == 1 else f"{number} {role}s"


def _names(ranks: range, role: str = "worker") -> str:
    if len(ranks) == 1:
        return f"{role} {ranks[0]}"
    return f"{role}s {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"
