"""Run directories, read back: what ``paceline runs`` prints. Only reads, and never fails on a damaged file.

A run that is still going, or whose machine went down, has no summary.json and a metrics.jsonl that may
end within a line. Its figures then come from the last whole line.
"""

from __future__ import annotations

import difflib
import platform
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from paceline.errors import UsageError
from paceline.events import Metric, Notice, RunInfo, Summary

TAIL_BYTES = 64 * 1024
T = TypeVar("T")


GOING_ON = ("starting", "running")


@dataclass(frozen=True)
class RunFiles:
    """What the files of one run directory say; None for a file that is absent or unreadable."""

    directory: Path
    info: RunInfo | None
    summary: Summary | None
    last: Metric | None

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def status(self) -> str:
        """As in run.json; "lost" where that says that it goes on, and its process is not there any more."""
        if self.summary is not None:
            return self.summary.status
        if self.info is None:
            return "unreadable"
        return "lost" if self.info.status in GOING_ON and is_alive(self.info) is False else self.info.status

    @property
    def steps(self) -> int | None:
        if self.summary is not None:
            return self.summary.steps
        return self.last.step if self.last is not None else None

    @property
    def loss(self) -> float | None:
        if self.summary is not None:
            return self.summary.loss
        return self.last.loss if self.last is not None else None


def read_run(directory: Path) -> RunFiles:
    return RunFiles(
        directory,
        info=_decoded(directory / "run.json", RunInfo),
        summary=_decoded(directory / "summary.json", Summary),
        last=_last_metric(directory / "metrics.jsonl"),
    )


def is_alive(info: RunInfo) -> bool | None:
    """Is the process there that the run was started with? None if that cannot be known from here."""
    front = next((process for process in info.processes if process.role == "front"), None)
    if front is None or front.host != platform.node():
        return None
    try:
        command = Path(f"/proc/{front.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"paceline" in command or b"python" in command


def list_runs(folder: Path) -> list[RunFiles]:
    """The runs in a folder, the oldest first (their names begin with the time). No folder, no runs."""
    return [read_run(path) for path in _in_order(folder)]


def find_run(folder: Path, wanted: str | None) -> RunFiles:
    """The run of that name, path or unique part of a name; the newest if ``wanted`` is None."""
    if wanted is not None and (Path(wanted) / "run.json").is_file():
        return read_run(Path(wanted))
    paths = _in_order(folder)
    if not paths:
        raise UsageError(f"no runs in {str(folder)!r}", fix="paceline runs show --run-dir DIR names another folder")
    if wanted is None:
        return read_run(paths[-1])
    names = [path.name for path in paths]
    matches = [wanted] if wanted in names else [name for name in names if wanted in name]
    if len(matches) == 1:
        return read_run(folder / matches[0])
    if matches:
        raise UsageError(f"run {wanted!r} could be any of: {', '.join(matches[-5:])}", fix="give more of its name")
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
    fix = f"did you mean {close[0]!r}?" if close else "paceline runs list"
    raise UsageError(f"run {wanted!r} is not in {str(folder)!r}", fix=fix)


def last_notices(directory: Path, count: int) -> list[Notice]:
    """The last lines of events.jsonl, the oldest of them first."""
    return _tail(directory / "events.jsonl", Notice, count)


def _in_order(folder: Path) -> list[Path]:
    """The run directories by their names, in which the time comes first; numbers by value: -2 before -10."""
    paths = [path.parent for path in folder.glob("*/run.json")]
    return sorted(paths, key=lambda path: [int(part) if part.isdigit() else part for part in _PARTS(path.name)])


_PARTS = re.compile(r"(\d+)", re.ASCII).split


def _decoded(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError):
        return None


def _last_metric(path: Path) -> Metric | None:
    last = _tail(path, Metric, 1)
    return last[0] if last else None


def _tail(path: Path, kind: type[T], count: int) -> list[T]:
    """The last ``count`` whole records among the file's last 64 KB; a line cut short is passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    if start > 0:
        del lines[0]  # it begins somewhere within
    found: deque[T] = deque()
    for line in reversed(lines):
        if len(found) == count:
            break
        try:
            found.appendleft(msgspec.json.decode(line, type=kind))
        except (UnicodeDecodeError, msgspec.DecodeError):
            continue
    return list(found)
