"""What goes into the coordinator, and what comes out of it: what has happened in a run, and what is to be done."""

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


@dataclass(frozen=True, slots=True)
class Wished:
    """A user wishes for so many workers, and servers (None: as there are); there is room for them."""

    workers: int | None = None
    servers: int | None = None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The user has asked for the run's end: who dies from here on is not replaced."""


Event = Came | Died | Wished | Interrupted


@dataclass(frozen=True, slots=True)
class Allocate:
    """Make a segment and send it as Memory to these workers, and to the servers if ``servers``."""

    request: messages.Wrap
    servers: bool
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Give:
    """Send the memory of this collective, made before, to a newcomer that has come to it."""

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Replace:
    """A worker or a server has died: tell the others, and start another in its place."""

    rank: int
    role: str = "worker"


@dataclass(frozen=True, slots=True)
class Open:
    """Start a worker, or a server, at a place that nobody has, or that one has left."""

    rank: int
    role: str = "worker"


@dataclass(frozen=True, slots=True)
class AskToLeave:
    """Let this worker leave when it can."""

    rank: int


@dataclass(frozen=True, slots=True)
class Serve:
    """From now on the servers of ``crew`` step (protocol/crew.py); those from rank ``kept`` on are to leave."""

    crew: int
    kept: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A worker has died, and the others go on without one in its place."""

    rank: int


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


Effect = Allocate | Give | Replace | Open | AskToLeave | Serve | GiveUp | Abort | Tell | Done
