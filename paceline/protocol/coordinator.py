"""The coordinator's decisions: who is in the run, what memory is given out, when the run is over and how.

Pure: ``handle`` takes what has happened and returns what to do. It does not know sockets, processes or time.
"""

from __future__ import annotations

import msgspec

from paceline.protocol import messages
from paceline.protocol.effects import (
    Abort,
    Allocate,
    AskToLeave,
    Came,
    Died,
    Done,
    Effect,
    Event,
    Give,
    GiveUp,
    Interrupted,
    Open,
    Replace,
    Tell,
    Wished,
)
from paceline.protocol.servers import Servers


class Coordinator:
    """Follows ``workers`` and ``servers`` from their start to their end.

    A worker that dies is replaced, unless it has died ``restarts`` times more since it last got on; then the others go
    on without it, if they are ``min_workers`` (None: as many as are wanted), else the run fails. One that has been
    added and has not joined yet is not missed.
    """

    def __init__(self, workers: int, servers: int, *, restarts: int = 0, min_workers: int | None = None) -> None:
        self._workers = set(range(workers))  # ranks that have a process, or have had the last
        self._servers = Servers(servers, restarts)
        self.wanted = workers
        self.coming: set[int] = set()  # of those that were added: who has not joined yet
        self._leaving: set[int] = set()  # who was asked to leave
        self._restarts, self._min_workers = restarts, min_workers
        self._deaths: dict[int, int] = {}  # of a worker since it last got on
        self._outs: dict[int, int] = {}  # of a worker whose gradients were not finite; getting on is no excuse for them
        self._given: dict[int, messages.Wrap] = {}
        self._lost: set[int] = set()
        self._raised: dict[int, messages.Failed] = {}  # by workers that are about to end of it
        self._said: set[str] = set()  # what scripts have raised so far
        self._interrupted = False
        self._told: dict[int, int] = {}  # reports of a worker's steps, since its process began
        self._asked: dict[int, dict[int, messages.Wrap]] = {}
        self._finished: set[int] = set()
        self._ended_workers: set[int] = set()
        self._failed = False
        self._wraps = 0
        self.reason = ""

    @property
    def was_interrupted(self) -> bool:
        """Was it the user that ended training, and not what came first: the scripts' own end?"""
        return self._interrupted and (self.reason == messages.INTERRUPTED or bool(self._lost))

    def handle(self, event: Event) -> list[Effect]:
        match event:
            case Came(role="worker", rank=rank, message=messages.Wrap() as request):
                return self._wrap(rank, request)
            case Came(role="worker", rank=rank, message=messages.Steps()):
                self._told[rank] = self._told.get(rank, 0) + 1
                if self._gets_on(rank):
                    self._deaths.pop(rank, None)
                    self._servers.deaths.clear()
            case Came(role="server", rank=rank, message=messages.Joined()):
                return self._servers.joined(rank)
            case Came(role="worker", rank=rank, message=messages.Joined(epoch=epoch)):
                self.coming.discard(rank)
                return [Tell("join", f"worker {rank} trains with the others, from epoch {epoch} on", "worker", rank)]
            case Came(role="worker", rank=rank, message=messages.Failed() as failure) if rank in self.coming:
                self._raised[rank], self._deaths[rank] = failure, self._restarts  # what it finds wrong stays so
            case Came(role="worker", rank=rank, message=messages.Failed(kind="ScriptError") as failure):
                return self._script_raised(rank, failure)
            case Came(role="worker", rank=rank, message=messages.Failed(kind="NotBack") as failure):
                self._raised[rank], self._deaths[rank] = failure, self._restarts  # it has been waited for long enough
            case Came(role="worker", rank=rank, message=messages.Failed(kind="WorkersLost") as failure):
                self._raised[rank] = failure  # by the deputy of one elsewhere, which is about to end
                return []
            case Came(role="worker", rank=rank, message=messages.Failed(kind="Poisoned") as failure):
                self._outs[rank] = self._outs.get(rank, 0) + 1
                self._raised[rank] = failure
                return []
            case Came(role=role, rank=rank, message=messages.Failed() as failure):
                return self._fail(role, rank, failure)
            case Came(role="worker", rank=rank, message=messages.Finished()):
                if rank in self._finished:
                    return []
                self._finished.add(rank)
                if rank in self._leaving:
                    return self._allocate_all()
                return [Tell("leave", f"worker {rank} has finished", "worker", rank), *self._check_stuck()]
            case Came(role="worker", message=messages.Ended(reason=reason)):
                known = self.reason
                if not known or reason == messages.INTERRUPTED:
                    self.reason = reason
                return [] if known else [Tell("stop", f"training is over: {reason}")]
            case Died(role=role, rank=rank, pid=pid, status=status):
                return self._died(role, rank, pid, status)
            case Wished(workers=workers, servers=servers):
                effects = [] if workers is None else self._scale(workers)
                return effects if servers is None else [*effects, *self._servers.scale(servers)]
            case Interrupted() if not self._interrupted:
                self._interrupted = True
                return [Tell("interrupt", "asked to stop: training ends here and is saved; asked again, all ends now")]
        return []

    def _wrap(self, rank: int, request: messages.Wrap) -> list[Effect]:
        self._wraps += 1
        known = self._given.get(request.number)
        if known is not None:
            if request.kind != known.kind:
                return self._fail("worker", rank, _not_alike(rank, request, known))
            return [Give(rank, request.number)]
        self._asked.setdefault(request.number, {})[rank] = request
        return self._allocate(request.number)

    def _allocate(self, number: int) -> list[Effect]:
        asked = self._asked[number]
        if self._workers - self._lost - (self._finished & self._leaving) - asked.keys():
            return self._check_stuck()
        del self._asked[number]
        first = self._given[number] = asked[min(asked)]
        for other, its in sorted(asked.items()):
            if its.kind != first.kind:
                return self._fail("worker", other, _not_alike(other, its, first))
        servers = first.kind == "exchange" and self._servers.wanted > 0
        return [Allocate(first, servers=servers, workers=tuple(sorted(asked)))]

    def _allocate_all(self) -> list[Effect]:
        """Somebody is not waited for any more."""
        return [effect for number in sorted(self._asked) for effect in self._allocate(number)]

    def _check_stuck(self) -> list[Effect]:
        """Somebody waits in a wrap for a worker whose script is already over: say so instead of hanging."""
        finished = self._finished - self._leaving
        if not self._asked or not finished:
            return []
        number, asked = min(self._asked.items())
        waiting, missing = min(asked), min(finished)
        failure = messages.Failed(
            "ConfigError",
            f"worker {missing} ended without the run.wrap that worker {waiting} waits in "
            f"({asked[waiting].what}, call {number})",
            "run.wrap is called by all workers, as often and in the same order",
            "do not call run.wrap under a condition on run.rank or run.is_main",
        )
        return self._fail("worker", missing, failure)

    def _fail(self, role: str, rank: int, failure: messages.Failed) -> list[Effect]:
        if self._failed:
            return []
        self._failed = True
        return [Tell("failed", f"{role} {rank}: {failure.what}", role, rank), Abort(role, rank, failure)]

    def _script_raised(self, rank: int, failure: messages.Failed) -> list[Effect]:
        """A bug is in every worker's script and comes again; what one raises once, after it got on, may be its own."""
        said = failure.what.partition(" raised ")[2]
        if said in self._said or not self._gets_on(rank) or not self._restarts or not said:
            return self._fail("worker", rank, failure)
        self._said.add(said)
        self._raised[rank] = failure
        return [Tell("raised", f"worker {rank}: {failure.what}", "worker", rank)]

    def _gets_on(self, rank: int) -> bool:
        """The first report may be the last, of a worker that ends."""
        return self._told.get(rank, 0) > 1

    def _replace(self, rank: int, what: str, failure: messages.Failed) -> list[Effect]:
        for asked in self._asked.values():
            asked.pop(rank, None)
        self._asked = {number: asked for number, asked in self._asked.items() if asked}
        self._told.pop(rank, None)
        deaths = self._deaths[rank] = self._deaths.get(rank, 0) + 1
        if max(deaths, self._outs.get(rank, 0)) <= self._restarts and not self._interrupted:
            return [Tell("died", f"{what}; another takes its place", "worker", rank), Replace(rank)]
        self._lost.add(rank)
        left = len(self._workers - self._lost - self._leaving)
        if rank in self.coming:
            self.coming.discard(rank)
            self.wanted -= 1
        elif left < (self.wanted if self._min_workers is None else self._min_workers) and not self._interrupted:
            if deaths > 1 and failure.kind not in ("Poisoned", "NotBack"):
                failure = msgspec.structs.replace(
                    failure, why=f"the {_ordinal(deaths)} time without getting on in between"
                )
            return [Tell("died", what, "worker", rank), *self._fail("worker", rank, failure)]
        self._ended_workers.add(rank)
        others = f"; the other{f' {left} go' if left > 1 else ' goes'} on without it" if left else ""
        effects: list[Effect] = [Tell("died", what + others, "worker", rank), GiveUp(rank)]
        effects += self._allocate_all()
        if self._ended_workers >= self._workers:
            effects.append(Done())
        return effects

    # --- scaling ---

    @property
    def wanted_servers(self) -> int:
        return self._servers.wanted

    def refusal(self, workers: int | None, servers: int | None = None) -> messages.Failed | None:
        """Why there cannot be so many workers or servers now, if there cannot. Whether there is room for them others
        know."""
        if self._failed or self._interrupted or self.reason or self._finished - self._leaving:
            return messages.Failed("UsageError", "the run is coming to its end", "training is over")
        if servers is not None and not self._servers.wanted:
            why = "its workers step the parameters, and servers would have to know their optimizers"
            fix = "start it with --servers 1, or more"
            return messages.Failed("UsageError", "a run that was started without servers stays so", why, fix)
        if servers is not None and servers < 1:
            return messages.Failed("UsageError", f"servers is {servers}; it must be 1 or more")
        if workers is None:
            return None
        if workers < 1:
            return messages.Failed("UsageError", f"workers is {workers}; it must be 1 or more")
        if self._min_workers is not None and workers < self._min_workers:
            what = f"workers is {workers}; the run was started with --min-workers {self._min_workers}"
            return messages.Failed("UsageError", what, fix=f"{self._min_workers} or more")
        return None

    def _scale(self, workers: int) -> list[Effect]:
        """To be asked only where there is no ``refusal``. Highest places leave first: worker 0 stays."""
        self.wanted = workers
        effects: list[Effect] = []
        for rank in range(workers):
            if rank not in self._workers - self._lost:
                effects += self._open(rank)
        for rank in sorted(self._workers - self._lost - self._leaving, reverse=True):
            if rank >= workers:
                self._leaving.add(rank)
                effects.append(AskToLeave(rank))
        return effects

    def _open(self, rank: int) -> list[Effect]:
        self._workers.add(rank)
        for known in (self._lost, self._ended_workers, self._finished, self._leaving):
            known.discard(rank)
        for told in (self._deaths, self._told, self._raised):
            told.pop(rank, None)
        self.coming.add(rank)
        return [Open(rank)]

    def _has_left(self, rank: int) -> list[Effect]:
        """It was asked to, and its process has ended; it may have been wished for again since."""
        for known in (self._workers, self._lost, self._ended_workers, self._finished, self._leaving, self.coming):
            known.discard(rank)
        number = len(self._workers - self._lost)
        text = f"worker {rank} has left; {number} {'goes' if number == 1 else 'go'} on"
        effects: list[Effect] = [Tell("leave", text, "worker", rank)]
        comes_again = rank < self.wanted and not (self.reason or self._failed or self._finished - self._leaving)
        effects += self._open(rank) if comes_again else self._allocate_all()
        return [*effects, Done()] if self._ended_workers >= self._workers else effects

    def _died(self, role: str, rank: int, pid: int, status: int) -> list[Effect]:
        clean = rank in self._finished if role == "worker" else self._ended_workers >= self._workers
        if role == "worker" and not clean and not self._failed:
            raised = self._raised.pop(rank, None)
            what = f"worker {rank} (pid {pid}) {how_ended(status)}" if raised is None else raised.what
            lost = messages.Failed("WorkersLost", what, _guess(status), f"its last output is in logs/worker-{rank}.log")
            return self._replace(rank, what, raised or lost)
        if role == "worker":
            self.coming.discard(rank)
            self._ended_workers.add(rank)
        if clean and rank in self._leaving and role == "worker" and status in (0, -9):
            return self._has_left(rank)
        if clean and (status == 0 or (role == "worker" and status == -9)):  # its script was over when it was killed
            done = role == "worker" and self._ended_workers >= self._workers
            if not done:
                return []
            return [Done()] if self._wraps else [Tell("warning", _NEVER_WRAPPED), Done()]
        if self._failed:
            return []
        failure = messages.Failed(
            "WorkersLost",
            f"{role} {rank} (pid {pid}) {how_ended(status)}",
            _guess(status),
            f"its last output is in logs/{role}-{rank}.log",
        )
        deaths = 1
        if role == "server" and not clean:
            effects = self._servers.died(rank, status, failure.what, may_replace=not self._interrupted)
            if effects:
                return effects
            deaths = self._servers.deaths.get(rank, 1)
        if deaths > 1:
            why = f"the {_ordinal(deaths)} time without any worker's getting on in between"
            failure = msgspec.structs.replace(failure, why=why)
        return [
            Tell("died", failure.what, role, rank),
            *self._fail(role, rank, failure),
        ]


_NEVER_WRAPPED = (
    "the script never called run.wrap, so its workers trained each on its own; "
    "it takes two lines: run = paceline.init(); model, optimizer, loader = run.wrap(model, optimizer, loader)"
)


def _not_alike(rank: int, its: messages.Wrap, first: messages.Wrap) -> messages.Failed:
    return messages.Failed(
        "ConfigError",
        f"worker {rank} wraps {its.what} where worker 0 wraps {first.what}",
        "run.wrap is called by all workers, as often and in the same order",
        "do not call run.wrap under a condition on run.rank or run.is_main",
    )


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"


def how_ended(status: int) -> str:
    if status < 0:
        return f"was killed by {_SIGNALS.get(-status, f'signal {-status}')}"
    return f"exited with status {status} in the middle of the run"


def _guess(status: int) -> str:
    if status == -9:
        return "somebody sent SIGKILL; often the kernel, when memory runs out (see dmesg)"
    if status in (-11, -7):
        return "a crash in native code, or memory that could not be had"
    return ""


_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}
