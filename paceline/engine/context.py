"""What a process of a run knows of the run: set once, when the launcher has forked it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.config import Job
from paceline.transport.board import Board
from paceline.transport.channel import Channel

if TYPE_CHECKING:
    from paceline.engine.worker import Worker


@dataclass(frozen=True)
class Context:
    """``channel`` leads to the launcher; ``board`` is shared with all processes of the host."""

    job: Job
    role: str
    rank: int
    directory: Path
    channel: Channel
    board: Board


current: Context | None = None
worker: Worker | None = None  # once the script has called init
importing_main = False  # true while a worker re-imports the user's main module (see run/launch.py)
