"""What every worker runs: a script of the user's, or a function of the program that launched the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Script:
    """``python path args...``, as the main module."""

    path: Path
    args: tuple[str, ...] = ()


WAITS, CAME, GONE = "waits", "came", "gone"
STARTED = "started"  # what home writes, before the run's directory
SERVERS = "servers"  # in the run's directory: the folder of files that tell where servers elsewhere are


@dataclass(frozen=True)
class Elsewhere:
    """Workers that run the script in processes that somebody else has started, perhaps on other hosts: each has a
    deputy here (``engine/elsewhere/deputizing.py``).

    Deputies listen at ``host``, each at a port of its own, by rank, which is held for them (transport/listener.py), and
    write "RANK WHAT" to ``report``, a descriptor: that it WAITS for its worker, that this CAME, or has not come again
    in time and is GONE. So do those of servers elsewhere, as "s1" in place of a rank; in ``server_ports``, by server,
    those at home have 0. ``job`` is what both ends of a link call it; ``starter`` the pid of the process that has asked
    for all this.
    """

    path: Path
    args: tuple[str, ...]
    host: str
    ports: tuple[int, ...]
    job: str
    starter: int
    report: int
    insecure: bool = False
    server_ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Doors:
    """What home reports first, as a line of JSON: where deputies listen, as in Elsewhere; on how many hosts, the first
    ones, no rank is a worker."""

    host: str
    ports: tuple[int, ...]
    server_ports: tuple[int, ...]
    without_workers: int


@dataclass(frozen=True)
class Order:
    """What home is told by the process that starts it; as JSON on its standard input."""

    script: str
    args: list[str]
    hosts: list[int]  # processes that will come, so many on each; home's host is the first
    options: dict[str, Any]  # of Job, as given to paceline.init
    restarts: bool  # will somebody start a process again that has died?
    host: str  # where deputies listen; may be told otherwise by the options
    job: str
    starter: int
    report: int  # a descriptor: Doors are written there, and what deputies say


@dataclass(frozen=True)
class Errand:
    """What a worker's process is told by the actor of Ray that starts it, or a server's; as JSON on its standard input.

    ``key``: of this run, in hex; empty where the node has the job's. ``threads`` is for torch. It is worker ``rank``,
    unless it is a ``server``.
    """

    rank: int
    job: str
    host: str
    port: int
    script: str
    args: tuple[str, ...]
    threads: int
    insecure: bool
    key: str
    server: int = -1


@dataclass(frozen=True)
class Call:
    """A function of the launching program, with its arguments, as that program's own process encoded them.

    ``main`` says how to import the launching program's main module (multiprocessing's preparation data);
    ``payload`` never leaves the host: it travels in anonymous memory inherited by the workers.
    """

    main: dict[str, object]
    payload: bytes
    name: str
