"""What a process of a run knows of the run: set once, when the launcher has forked it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from paceline.config import Job
from paceline.data.trained import Trained
from paceline.transport.board import Board
from paceline.transport.channel import Channel
from paceline.transport.lock import Lock


@dataclass(frozen=True)
class Context:
    """``channel`` leads to the launcher; ``board`` is shared with all processes of the host, ``lock`` taken by one at
    a time."""

    job: Job
    role: str
    rank: int
    directory: Path
    channel: Channel
    board: Board
    lock: Lock
    resume: Path | None = None  # the checkpoint that the run goes on from
    # What of their epochs had been trained on then, by loader: newcomers know it too, who do not read the checkpoint.
    trained: tuple[tuple[Trained, ...], ...] = ()

    def ring(self) -> None:
        """Tell of a change that rounds depend on, also those who wait for no one in particular."""
        self.board.ring(self.rank)
        with self.lock:
            self.board.ring(self.board.common)


class Ending(Protocol):
    """What a process must do with its worker at the end."""

    def finish(self) -> None: ...

    def close(self) -> None: ...


current: Context | None = None
worker: Ending | None = None  # once the script has called init
importing_main = False  # true while a worker re-imports the user's main module (see run/launch.py)
