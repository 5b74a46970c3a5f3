"""The processes of a run, as its launcher knows them: who is there, who is to come, how often each has been forked."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from paceline.engine.launcher.channels import ZYGOTE, Channels
from paceline.engine.launcher.watch import Whose
from paceline.protocol import messages


class Processes:
    """Has them forked by the zygote, with the board ``board_fd`` and, for workers, what they are to call. ``setup`` is
    what the next is told; so many are ``expected``."""

    def __init__(self, channels: Channels, logs: Path, setup: bytes, board_fd: int, expected: int) -> None:
        self._channels, self._logs, self._board_fd, self._expected = channels, logs, board_fd, expected
        self.setup = setup
        self.call: int | None = None  # a descriptor
        self.alive: dict[Whose, int] = {}  # their pids
        self._births: dict[Whose, int] = {}
        self._kill_at_s: float | None = None

    @property
    def are_over(self) -> bool:
        return not self.alive and not self._expected

    @property
    def are_there(self) -> bool:
        """All that were to come."""
        return not self._expected

    def fork_first(self, servers: int, workers: int) -> None:
        """Those that were expected from the beginning."""
        self._expected = 0
        for role, count in (("server", servers), ("worker", workers)):
            for rank in range(count):
                self.fork(role, rank)

    def fork(self, role: str, rank: int) -> None:
        self._expected += 1
        birth = self._births[role, rank] = self._births.get((role, rank), 0) + 1
        if self._channels.silent:
            return
        log = os.open(self._logs / f"{role}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        call = (self.call,) if self.call is not None else ()
        self._channels.send(ZYGOTE, messages.Fork(role, rank, self.setup, birth), (self._board_fd, log, *call))
        os.close(log)

    def forked(self, role: str, rank: int, pid: int) -> None:
        self.alive[role, rank] = pid
        self._expected -= 1

    def ended(self, role: str, rank: int) -> None:
        self.alive.pop((role, rank), None)

    def give_up(self) -> None:
        """Nobody can be forked any more, and who was has been killed."""
        self.alive.clear()
        self._expected = 0

    # --- the end by force ---

    def end_within(self, wait_s: float) -> None:
        """Who has not ended by then is to be killed; the earliest time counts."""
        self._kill_at_s = min(self._kill_at_s or 2**62, time.monotonic() + wait_s)

    @property
    def are_late(self) -> bool:
        return self._kill_at_s is not None and time.monotonic() > self._kill_at_s

    def kill_all(self) -> None:
        self._kill_at_s = None
        if self._expected:
            self.give_up()  # the zygote is still importing: it is all there is to stop
        for pid in self.alive.values():
            os.kill(pid, signal.SIGKILL)
