"""Which processes do not get on, by what the kernel tells of them (/proc/PID/stat)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STOPPED_S = 1.0
Whose = tuple[str, int]  # role, rank


@dataclass
class _Seen:
    pid: int
    state: str
    ticks: int
    since_s: float


class Watch:
    """A process is stuck when it was stopped (SIGSTOP) for a second, or has used no processor for ``hang_s`` while it
    hangs: others wait for it. So one that computes for long is never taken for stuck."""

    def __init__(self, hang_s: float, read: Callable[[int], str | None] | None = None) -> None:
        self._hang_s, self._read = hang_s, read or _stat
        self._seen: dict[Whose, _Seen] = {}

    def look(
        self, alive: Mapping[Whose, int], now_s: float, hangs: Callable[[str, int], bool]
    ) -> Iterator[tuple[Whose, str]]:
        """Who is stuck now, and what it is that is wrong with it; each is told once."""
        for whose, pid in alive.items():
            text = self._read(pid)
            if text is None:
                continue
            state, *rest = text.rpartition(")")[2].split()
            ticks = int(rest[10]) + int(rest[11])  # in user mode, in the kernel
            stopped, hanging = state == "T", state in "SD" and hangs(*whose)
            state = "stopped" if stopped else "hanging" if hanging else ""
            seen = self._seen.get(whose)
            if seen is None or (seen.pid, seen.state, seen.ticks) != (pid, state, ticks):
                self._seen[whose] = _Seen(pid, state, ticks, now_s)
                continue
            lasted_s = now_s - seen.since_s
            if state and lasted_s >= (STOPPED_S if stopped else self._hang_s):
                seen.since_s = now_s
                if stopped:
                    yield whose, f"has been stopped for {lasted_s:.1f} s"
                else:
                    yield whose, f"has done nothing for {lasted_s:.0f} s while others wait for it"


def _stat(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
