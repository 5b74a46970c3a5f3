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


@dataclass(frozen=True)
class Elsewhere:
    """Workers that run the script in processes that somebody else has started, perhaps on other hosts: each has a
    deputy here (``engine/deputy.py``).

    Deputies listen at ``host``, each at a port of its own: from ``port`` on, by rank, or any (0), and write it to
    ``report``, a descriptor. ``job`` is what both ends of a link call it; ``starter`` the pid of the process that has
    asked for all this.
    """

    path: Path
    args: tuple[str, ...]
    host: str
    port: int
    job: str
    starter: int
    report: int
    insecure: bool = False


@dataclass(frozen=True)
class Order:
    """What home is told by the process that starts it; as JSON on its standard input."""

    script: str
    args: list[str]
    workers: int
    options: dict[str, Any]  # of Job, as given to paceline.init
    host: str
    port: int
    job: str
    starter: int
    report: int
    insecure: bool


@dataclass(frozen=True)
class Call:
    """A function of the launching program, with its arguments, as that program's own process encoded them.

    ``main`` says how to import the launching program's main module (multiprocessing's preparation data);
    ``payload`` never leaves the host: it travels in anonymous memory inherited by the workers.
    """

    main: dict[str, object]
    payload: bytes
    name: str
