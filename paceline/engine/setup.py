"""What a process is told at its birth; plain data, so that the launcher needs no torch to say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from paceline.config import Job, parse_pace
from paceline.data.trained import Trained


class Door(msgspec.Struct, frozen=True):
    """Where deputies wait for the workers they stand for; see ``program.Elsewhere``."""

    host: str
    ports: list[int]
    job: str
    starter: int
    insecure: bool
    server_ports: list[int] = []


class Setup(msgspec.Struct, frozen=True):
    """Of ``script`` and ``call`` one is set in a worker's. ``threads`` is for torch."""

    job: dict[str, Any]
    directory: str
    threads: int
    script: str = ""
    args: tuple[str, ...] = ()
    call: dict[str, Any] | None = None
    resume: str = ""  # the checkpoint to go on from
    trained: tuple[tuple[Trained, ...], ...] = ()  # what the run that made it had trained on, by loader
    door: Door | None = None  # workers are deputies


def encode_job(job: Job) -> dict[str, Any]:
    fields = {name: getattr(job, name) for name in Job.__dataclass_fields__}
    return fields | {"pace": str(job.pace), "runs": str(job.runs)}


def decode_job(fields: dict[str, Any]) -> Job:
    return Job(**(fields | {"pace": parse_pace(fields["pace"]), "runs": Path(fields["runs"])}))
