"""What every worker runs: a script of the user's, or a function of the program that launched the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Script:
    """``python path args...``, as the main module."""

    path: Path
    args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """A function of the launching program, with its arguments, as that program's own process encoded them.

    ``main`` says how to import the launching program's main module (multiprocessing's preparation data);
    ``payload`` never leaves the host: it travels in anonymous memory inherited by the workers.
    """

    main: dict[str, object]
    payload: bytes
    name: str
