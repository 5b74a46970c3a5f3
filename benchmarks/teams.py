"""The processes of one way of training one job: started once, asleep until told to train a slice, ended for sure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Self

import psutil

from benchmarks.rivals import Way
from paceline.engine import allocator

_START_S, _END_S = 180.0, 15.0
_LEAD_S = 0.01  # between telling workers and the moment they begin: all are awake by then
ROOT = str(Path(__file__).resolve().parent.parent)


class TeamError(Exception):
    """A process of a team has ended or fallen silent; the message has what it last said."""


class Team:
    """A context manager; leaving it ends every process. ``ready`` and ``warm_up`` come before ``slice``."""

    def __init__(self, way: Way, job: str, directory: Path) -> None:
        self.way = way
        self.parameter_bytes = 0
        self._path = directory / f"{job}-{way.name}"
        self._steps = 0
        self._pids: list[int] = []
        self._lines: list[IO[str]] = []
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(1.0)
        self._listener.bind(str(self._path))
        self._listener.listen(way.answering)
        self._processes = [self._start(job, rank) for rank in range(way.started)]

    def _start(self, job: str, rank: int) -> subprocess.Popen[bytes]:
        known = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TP_SOCKET_IFNAME": "lo",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_failure_threshold": "1000",  # it is stopped while others are measured
            "PYTHONPATH": f"{ROOT}{os.pathsep}{known}" if known else ROOT,
        }
        if self.way.keeps:
            environment |= allocator.settings(environment)
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.rivals", self.way.name, job, str(rank), str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is the benchmark's to deal with. Not a session for each process: Linux's autogroups give
                # sessions equal parts of a busy machine, and paceline's workers have one session together.
                process_group=0,
                env=environment,
            )

    def _log(self, rank: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{rank}.log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> None:
        """Blocks until every worker has its model. Raises TeamError."""
        give_up_s = time.monotonic() + _START_S
        while len(self._pids) < self.way.answering:
            if time.monotonic() > give_up_s or any(process.poll() is not None for process in self._processes):
                raise self._error("has not started")
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(_START_S)
            self._connections.append(connection)
            self._lines.append(connection.makefile("rw", encoding="utf-8"))
            hello = self._read(self._lines[-1])
            self._pids.append(hello["pid"])
            self.parameter_bytes = hello["parameter_bytes"]

    def warm_up(self, seconds: float) -> None:
        """Train for about so long, and settle how many steps a slice of ``seconds`` has."""
        steps, took_s = 1, 0.0
        while took_s < seconds / 2:
            answers = self._train(steps, seconds)
            took_s = max(answer["seconds"] for answer in answers)
            self._steps = max(1, round(steps * seconds / took_s))
            steps = min(4 * steps, max(steps + 1, self._steps // 2 + 1))

    def slice(self, seconds: float) -> float:
        """Train a slice of about ``seconds``: the workers' steps a second, summed.

        Workers that wait for each other take equally many steps and end together. Others train for the time given,
        so that none has the machine to itself while another finishes.
        """
        answers = self._train(self._steps if self.way.together else 0, seconds)
        return float(sum(answer["steps"] / answer["seconds"] for answer in answers))

    def _train(self, steps: int, seconds: float) -> list[Any]:
        for connection in self._connections:
            connection.settimeout(_START_S + 10 * seconds)
        order = json.dumps({"at": time.monotonic() + _LEAD_S, "steps": steps, "seconds": seconds})
        self._signal_restless(signal.SIGCONT)
        for lines in self._lines:
            try:
                print(order, file=lines, flush=True)
            except OSError as error:
                raise self._error("has ended") from error
        answers = [self._read(lines) for lines in self._lines]
        self._signal_restless(signal.SIGSTOP)
        return answers

    def _signal_restless(self, number: signal.Signals) -> None:
        """Stop what does not sleep while others are measured, and wake it: paceline's launcher, which looks around 20
        times a second, and all of Ray's and rpc's processes, which keep a core busy between them."""
        if self.way.kind == "paceline":
            self._processes[0].send_signal(number)
        elif self.way.kind in ("ray", "rpc"):
            for member in [member for process in self._processes for member in _family(process)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(number)

    def _read(self, lines: IO[str]) -> Any:
        try:
            line = lines.readline()
        except OSError as error:  # a time-out is one too
            raise self._error(f"does not answer: {error}") from error
        if not line:
            raise self._error("has ended")
        return json.loads(line)

    def memory_mb(self) -> tuple[float, float]:
        """Proportional set size in MB of the workers, and of all processes of this way.

        Pages of files are left out: torch's libraries, which all processes of all ways have in common here.
        """
        everyone = {member.pid for process in self._processes for member in _family(process)}
        return (
            sum(_pss_mb(pid) for pid in self._pids),
            sum(_pss_mb(pid) for pid in everyone.union(self._pids)),
        )

    def cpu_s(self) -> float:
        """Seconds of CPU that all processes of this way have used so far."""
        everyone = [member for process in self._processes for member in _family(process)]
        return float(sum(sum(member.cpu_times()[:2]) for member in everyone))

    def close(self) -> None:
        """Let every process end; kill those that do not."""
        self._signal_restless(signal.SIGCONT)
        families = [member for process in self._processes for member in _family(process)]
        for lines, connection in zip(self._lines, self._connections, strict=True):
            with contextlib.suppress(OSError):  # what it was still to be told, it is not there to hear
                lines.close()
            connection.close()
        self._listener.close()
        give_up_s = time.monotonic() + (_END_S if len(self._pids) == self.way.answering else 0.0)
        for process in self._processes:
            try:
                process.wait(max(give_up_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
        for member in families:
            try:
                member.send_signal(signal.SIGKILL)  # psutil has made sure that the pid is still this process
            except psutil.NoSuchProcess:
                continue
        for process in self._processes:
            process.wait(_END_S)

    def _error(self, what: str) -> TeamError:
        said = [self._log(rank).read_text(errors="replace")[-2000:] for rank in range(self.way.started)]
        return TeamError("\n".join([f"{self._path.name}: a process {what}", *filter(None, said)]))


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss_mb(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = dict(line.split(":") for line in rollup.splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) / 1000
