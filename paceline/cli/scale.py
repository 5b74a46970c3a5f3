"""``paceline scale``: tells a run that is going on how many workers and servers it shall have."""

from __future__ import annotations

from pathlib import Path

from paceline import errors
from paceline.engine.launcher.control import ask
from paceline.errors import HostError
from paceline.protocol.messages import Scale, Scaled
from paceline.report.runs import find_run


def scale_run(wanted: str | None, workers: int | None, servers: int | None, folder: Path) -> int:
    """The command ``scale``; returns the exit code. Raises UsageError or HostError."""
    found = find_run(folder, wanted)
    answer = ask(found.directory, Scale(workers, servers))
    if not isinstance(answer, Scaled):
        raise HostError(f"run {found.name!r} answers {type(answer).__name__}")
    if answer.kind:
        raise errors.kind_of(answer.kind, HostError)(answer.what, why=answer.why, fix=answer.fix)
    for line in answer.told:
        print(line)
    return 0
