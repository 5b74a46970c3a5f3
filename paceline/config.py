"""What a run is asked to do: the pace, and the frozen ``Job`` that every process agrees on.

A ``Job`` checks itself once, all fields together, when it is made; nothing later re-reads flags.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from paceline.errors import UsageError

MAX_WORKERS = 256  # the board in shared memory has this many columns at most
MAX_SERVERS = 64

ASSIGNMENTS = ("round_robin", "hash", "random", "block")


@dataclass(frozen=True)
class Sync:
    """Lockstep: a round closes when every worker with data has pushed; the mean is weighted by samples."""

    def __str__(self) -> str:
        return "sync"


Pace = Sync
PACES = ("sync",)


def parse_pace(text: str) -> Pace:
    """``"sync"`` -> ``Sync()``. Raises UsageError that lists the paces there are."""
    if text.strip().lower() == "sync":
        return Sync()
    raise UsageError(f"pace {text!r} is not known; it must be one of: {', '.join(PACES)}", fix=_nearest(text, PACES))


@dataclass(frozen=True)
class Job:
    """One run, fully resolved.

    ``workers`` and ``servers`` are counts of processes; with 0 servers the workers divide the
    parameters among themselves. ``threads`` is per process (None: cores // workers, at least 1).
    ``steps`` counts rounds, ``epochs`` passes over the training loader; ``until_loss`` and
    ``patience`` stop at convergence. ``runs`` is the folder in which run directories are made.
    """

    name: str
    workers: int = 2
    servers: int = 0
    pace: Pace = field(default_factory=Sync)
    assign: str = "round_robin"
    threads: int | None = None
    seed: int = 0
    steps: int | None = None
    epochs: int | None = None
    until_loss: float | None = None
    patience: int | None = None
    runs: Path = Path("runs")

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", Path(self.runs))
        _within("workers", self.workers, 1, MAX_WORKERS)
        _within("servers", self.servers, 0, MAX_SERVERS)
        for name in ("threads", "steps", "epochs", "patience"):
            value = getattr(self, name)
            if value is not None:
                _within(name, value, 1, 2**53)
        _within("seed", self.seed, 0, 2**63 - 1)
        if self.assign not in ASSIGNMENTS:
            raise UsageError(
                f"assign is {self.assign!r}; it must be one of: {', '.join(ASSIGNMENTS)}",
                fix=_nearest(self.assign, ASSIGNMENTS),
            )
        if self.until_loss is not None and self.until_loss != self.until_loss:
            raise UsageError("until-loss is nan; it must be a number")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be a whole number")
    if not low <= value <= high:
        limit = f"{low} or more" if value < low else f"{high} or less"
        raise UsageError(f"{name} is {value}; it must be {limit}")


def _nearest(text: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(text.strip().lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
