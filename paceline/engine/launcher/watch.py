"""Which processes do not get on, by what the kernel tells of them (/proc/PID/stat) and they themselves on the board."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

STOPPED_S = 1.0
_MEDIANS, _LONGEST = 20.0, 2.0
Whose = tuple[str, int]  # role, rank


class StepTimes:
    """How long the run's steps take, of whichever worker. ``longest_ns``: the longest of each, as the board has it."""

    def __init__(self, longest_ns: Sequence[int] | memoryview[int]) -> None:
        self._recent: deque[float] = deque(maxlen=101)
        self._longest_ns = longest_ns

    def add(self, seconds: Iterable[float]) -> None:
        self._recent.extend(seconds)

    def overdue_s(self, hang_s: float) -> float:
        """Who has one batch in hand for so long does not compute any more. What has once taken long, such as a
        compilation or an evaluation in the midst of steps, may come again."""
        usual_s = median(self._recent) if self._recent else 0.0
        return max(hang_s, _MEDIANS * usual_s, _LONGEST * max(self._longest_ns) / 1e9)


class Watch:
    """A process is stuck when it was stopped (SIGSTOP) for a second; or when others wait for it, and it has used no
    processor for ``hang_s``, or has had the same batch in hand, which is neither stepped nor left for another, for
    longer than any step takes. So one that computes for long between its steps is never taken for stuck."""

    def __init__(self, hang_s: float, read: Callable[[int], str | None] | None = None) -> None:
        self._hang_s, self._read = hang_s, read or _stat
        self._since: dict[tuple[Whose, str], tuple[object, float]] = {}

    def look(
        self,
        alive: Mapping[Whose, int],
        now_s: float,
        hangs: Callable[[str, int], bool],
        in_hand: Callable[[str, int], int] = lambda role, rank: 0,
        steps: StepTimes | None = None,
    ) -> Iterator[tuple[Whose, str]]:
        """Who is stuck now, and what it is that is wrong with it; each is told once.

        ``hangs``: do others wait for it? ``in_hand``: another number for each batch, 0 for none.
        """
        for whose, pid in alive.items():
            text = self._read(pid)
            if text is None:
                continue
            state, *rest = text.rpartition(")")[2].split()
            ticks = int(rest[10]) + int(rest[11])  # in user mode, in the kernel
            awaited = hangs(*whose)
            stopped, idle = state == "T", state in "SD" and awaited
            batch = in_hand(*whose) if awaited else 0
            still_s = self._lasts((whose, "still"), (pid, ticks, stopped) if stopped or idle else None, now_s)
            busy_s = self._lasts((whose, "busy"), (pid, batch) if batch else None, now_s)
            if stopped and still_s >= STOPPED_S:
                told = f"has been stopped for {still_s:.1f} s"
            elif idle and still_s >= self._hang_s:
                told = f"has done nothing for {still_s:.0f} s while others wait for it"
            elif steps is not None and busy_s >= self._hang_s and busy_s >= steps.overdue_s(self._hang_s):
                told = f"has not finished a step for {busy_s:.0f} s while others wait for it"
            else:
                continue
            for what in ("still", "busy"):
                self._since.pop((whose, what), None)
            yield whose, told

    def _lasts(self, what: tuple[Whose, str], mark: object, now_s: float) -> float:
        """For how many seconds it has been seen so, without a change; None is not counted."""
        if mark is None:
            self._since.pop(what, None)
            return 0.0
        seen, since_s = self._since.get(what, (None, now_s))
        if seen != mark:
            since_s = now_s
        self._since[what] = mark, since_s
        return now_s - since_s


def _stat(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
