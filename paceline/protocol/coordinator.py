"""The coordinator's decisions: who is in the run, what memory is given out, when the run is over and how.

Pure: ``handle`` takes what has happened and returns what to do. It does not know sockets, processes or time.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.protocol import messages


@dataclass(frozen=True, slots=True)
class Came:
    """A message arrived from a process."""

    role: str
    rank: int
    message: messages.Any


@dataclass(frozen=True, slots=True)
class Died:
    """A process has ended with this exit status, minus the signal if one killed it."""

    role: str
    rank: int
    pid: int
    status: int


Event = Came | Died


@dataclass(frozen=True, slots=True)
class Allocate:
    """Make a segment and send it as Memory to all workers, and to the servers if ``servers``."""

    request: messages.Wrap
    servers: bool


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop everyone; the run has failed for this reason (a Failed message, whoever said it)."""

    role: str
    rank: int
    failure: messages.Failed


@dataclass(frozen=True, slots=True)
class Tell:
    """Something a person may want to know."""

    kind: str
    text: str
    role: str = ""
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """All workers have finished; servers may end."""


Effect = Allocate | Abort | Tell | Done


class Coordinator:
    """Follows ``workers`` and ``servers`` from their start to their end."""

    def __init__(self, workers: int, servers: int) -> None:
        self._workers, self._servers = workers, servers
        self._asked: dict[int, dict[int, messages.Wrap]] = {}
        self._finished: set[int] = set()
        self._ended_workers: set[int] = set()
        self._failed = False
        self._wraps = 0
        self.reason = ""

    def handle(self, event: Event) -> list[Effect]:
        match event:
            case Came(role="worker", rank=rank, message=messages.Wrap() as request):
                return self._wrap(rank, request)
            case Came(role=role, rank=rank, message=messages.Failed() as failure):
                return self._fail(role, rank, failure)
            case Came(role="worker", rank=rank, message=messages.Finished()):
                self._finished.add(rank)
                return [Tell("leave", f"worker {rank} has finished", "worker", rank), *self._check_stuck()]
            case Came(role="worker", message=messages.Ended(reason=reason)) if not self.reason:
                self.reason = reason
                return [Tell("stop", f"training is over: {reason}")]
            case Died(role=role, rank=rank, pid=pid, status=status):
                return self._died(role, rank, pid, status)
        return []

    def _wrap(self, rank: int, request: messages.Wrap) -> list[Effect]:
        self._wraps += 1
        asked = self._asked.setdefault(request.number, {})
        asked[rank] = request
        if len(asked) < self._workers:
            return self._check_stuck()
        del self._asked[request.number]
        first = asked[0]
        for other, its in sorted(asked.items()):
            if its.kind != first.kind:
                return self._fail("worker", other, _not_alike(other, its, first))
        return [Allocate(first, servers=first.kind == "exchange" and self._servers > 0)]

    def _check_stuck(self) -> list[Effect]:
        """Somebody waits in a wrap for a worker whose script is already over: say so instead of hanging."""
        if not self._asked or not self._finished:
            return []
        number, asked = min(self._asked.items())
        waiting, missing = min(asked), min(self._finished)
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

    def _died(self, role: str, rank: int, pid: int, status: int) -> list[Effect]:
        clean = rank in self._finished if role == "worker" else len(self._ended_workers) == self._workers
        if role == "worker":
            self._ended_workers.add(rank)
        if clean and status == 0:
            done = role == "worker" and len(self._ended_workers) == self._workers
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
