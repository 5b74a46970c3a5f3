"""Real processes for the tests of this folder: start one, read what it says, and see that nobody is left.

Every process carries a mark in its environment, which all that it forks or starts inherit. So the processes of
a run are found by asking the kernel, not by believing the run's own files.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
_MARK = "STARTED_BY_A_TEST"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal) and what it wrote."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def answer(self) -> dict[str, Any]:
        """The object that --json promises as the last line."""
        return dict(json.loads(self.out.splitlines()[-1]))

    @property
    def directory(self) -> Path:
        """The run directory, the only one of this folder or the one that the answer names."""
        found = sorted((self.folder / "runs").iterdir())
        if len(found) > 1:
            return self.folder / str(self.answer["run"])
        return found[0]

    @property
    def info(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "run.json").read_text()))

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "summary.json").read_text()))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return _lines(self.directory / "metrics.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        return _lines(self.directory / "events.jsonl")

    @property
    def error(self) -> str:
        """The error block: from ``error:`` to the end of stderr."""
        _, found, block = self.err.rpartition("error: ")
        assert found, f"no error block in:\n{self.err}"
        return block

    def pid(self, role: str, rank: int) -> int:
        processes = self.info["processes"]
        return int(next(p["pid"] for p in processes if (p["role"], p["rank"]) == (role, rank)))

    def log(self, rank: int, role: str = "worker") -> str:
        return (self.directory / "logs" / f"{role}-{rank}.log").read_text()


class Running:
    """A started command. Its stdout and stderr are read here, by the thread that asks."""

    def __init__(
        self, command: Sequence[str], folder: Path, variables: dict[str, str], timeout_s: float = TIMEOUT_S
    ) -> None:
        self._folder = folder
        self._mark = f"{folder}:{time.monotonic_ns()}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", _MARK: self._mark} | variables
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._texts = {self._process.stdout: b"", self._process.stderr: b""}
        self._open = set(self._texts)
        self._timeout_s, self._deadline_s = timeout_s, time.monotonic() + timeout_s

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def out(self) -> str:
        assert self._process.stdout is not None
        return self._texts[self._process.stdout].decode(errors="replace")

    @property
    def err(self) -> str:
        assert self._process.stderr is not None
        return self._texts[self._process.stderr].decode(errors="replace")

    def until(self, text: str) -> None:
        """Read until the command has written ``text``."""
        while text not in self.out + self.err:
            assert self._read(), f"it ended without {text!r}:\n{self.out}\n{self.err}"

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_launcher(self, number: int) -> None:
        """Of the only run in this folder; the last launcher of it."""
        (path,) = (self._folder / "runs").glob("*/run.json")
        processes = json.loads(path.read_text())["processes"]
        os.kill([process["pid"] for process in processes if process["role"] == "launcher"][-1], number)

    def others(self) -> list[int]:
        """The pids of all processes that come from this one, itself left out."""
        return [pid for pid in marked(self._mark) if pid != self.pid]

    def end(self) -> Ended:
        """Read to the end, see the process and all that came from it end, and close everything."""
        try:
            while self._read():
                pass
            code = self._process.wait(self._left_s())
            await_death(open_pids(marked(self._mark)), self._left_s())
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            raise AssertionError(f"it hangs: {error}\n{self.out}\n{self.err}") from None
        finally:
            self.close()
        return Ended(code, self.out, self.err, self._folder)

    def close(self) -> None:
        """Leave nothing behind, whatever the test came to."""
        self._process.kill()  # one that has just been started does not show its mark yet
        for pid in marked(self._mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        for stream in self._texts:
            stream.close()

    def _read(self) -> bool:
        """Take in what has come; False when both streams are at their end."""
        if not self._open:
            return False
        poll = select.poll()  # select() knows no descriptor above 1023
        for stream in self._open:
            poll.register(stream, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._left_s() * 1000)}
        if not ready:
            raise TimeoutError(f"nothing came for the rest of {self._timeout_s:g} s")
        for stream in [stream for stream in self._open if stream.fileno() in ready]:
            data = os.read(stream.fileno(), _CHUNK)
            self._texts[stream] += data
            if not data:
                self._open.discard(stream)
        return True

    def _left_s(self) -> float:
        return max(self._deadline_s - time.monotonic(), 0.0)


class Runner:
    """Starts Python in ``folder``, with paceline importable there."""

    def __init__(self, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.folder, self._timeout_s = folder, timeout_s
        self._started: list[Running] = []
        self.kept: dict[str, RawIOBase] = {}

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def keep(self, pipe: str) -> None:
        """Have this pipe open at both ends, as ``kept``: so no write waits for somebody who may have died."""
        self.kept[pipe] = (self.folder / pipe).open("r+b", buffering=0)

    def start(self, *arguments: str, **variables: str) -> Running:
        """``python ARGUMENTS`` with these environment variables."""
        return self.start_in((), *arguments, **variables)

    def start_in(self, place: Sequence[str], *arguments: str, **variables: str) -> Running:
        """The same behind a command that starts it elsewhere: ``ip netns exec NAME``."""
        running = Running([*place, sys.executable, *arguments], self.folder, variables, self._timeout_s)
        self._started.append(running)
        return running

    def python(self, *arguments: str, **variables: str) -> Ended:
        return self.start(*arguments, **variables).end()

    def paceline(self, *arguments: str) -> Ended:
        return self.python("-m", "paceline", *arguments)

    def run(self, script: str, *options: str, args: Iterable[str] = ()) -> Ended:
        """``paceline run --json OPTIONS SCRIPT ARGS`` with a script of this text (or of this name, if it ends so)."""
        return self.start_run(script, *options, args=args).end()

    def start_run(self, script: str, *options: str, args: Iterable[str] = (), **variables: str) -> Running:
        name = script if script.endswith(".py") else str(self.write("train.py", script).name)
        return self.start("-m", "paceline", "run", "--json", *options, name, *args, **variables)

    @contextmanager
    def follow(self, path: Path) -> Iterator[Running]:
        """What a file has, and gets while this lasts."""
        following = Running(["tail", "-n", "+1", "-f", str(path)], self.folder, {}, self._timeout_s)
        try:
            yield following
        finally:
            following.close()

    def close(self) -> None:
        for running in self._started:
            running.close()
        for pipe in self.kept.values():
            pipe.close()


def marked(mark: str) -> list[int]:
    """The pids of all living processes that carry this mark."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def open_pids(pids: Iterable[int]) -> dict[int, int]:
    """pid -> a descriptor that becomes readable when that process has ended; those that have are left out."""
    opened = {}
    for pid in pids:
        try:
            opened[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    return opened


def await_death(opened: dict[int, int], timeout_s: float = TIMEOUT_S) -> None:
    """Block until all of these processes have ended; closes the descriptors. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    try:
        for pid, descriptor in opened.items():
            ended, _, _ = select.select([descriptor], [], [], max(deadline_s - time.monotonic(), 0.0))
            if not ended:
                raise TimeoutError(f"process {pid} is left: {_command(pid)}")
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone by now"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
