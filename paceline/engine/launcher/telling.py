"""What the user learns of a run, told by the launcher: records, the lines that worker 0 prints, and how it ended."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from paceline import config_file, errors, events
from paceline.config import Job
from paceline.engine.launcher.metrics import Merger
from paceline.engine.launcher.recorder import Recorder
from paceline.engine.setup import Setup
from paceline.protocol import messages

Failure: TypeAlias = tuple[str, int, messages.Failed]  # of whom, and what


class Telling:
    """``began_s``: when the run began, by the host's clock, if another launcher has told of it before. ``send`` tells
    the front. ``silent``: what is recorded was recorded before."""

    def __init__(
        self, job: Job, begin: messages.Begin, began_s: float | None, send: Callable[[messages.Any], None]
    ) -> None:
        resume = begin.steps if begin.resumed else None
        self._send, self._job = send, job
        self._setup = msgspec.msgpack.decode(begin.setup, type=Setup)
        again = began_s is not None
        self.recorder = Recorder(job, Path(begin.directory), self.show, begin.argv, resume, again=again)
        self.directory = self.recorder.directory
        self.started_s = time.monotonic() - self.recorder.offset_s if began_s is None else began_s
        self.merger = Merger(self.started_s, after=begin.after, steps=begin.steps)
        self.at_s = 0.0  # when that had come which is being obeyed
        self.silent = False
        self._shown_output = begin.shown.get("output", 0)
        self._log: _Tail | None = None

    @property
    def info(self) -> events.RunInfo:
        return self.recorder.info

    def now(self) -> float:
        return round(time.monotonic() - self.started_s, 6)

    def show(self, file: str, place: int, records: list[events.Record]) -> None:
        self._send(messages.Show(file, place, msgspec.msgpack.encode(records)))

    # --- while it runs ---

    def record(self, record: events.Record) -> None:
        if not self.silent:
            self.recorder.take(record)

    def note(self, kind: str, text: str, role: str = "", rank: int | None = None) -> None:
        """It follows from what has come."""
        self.record(events.Notice(self.at_s, kind, text, role, rank))

    def note_now(self, kind: str, text: str, role: str = "", rank: int | None = None) -> None:
        """The launcher has seen it itself."""
        self.recorder.take(events.Notice(self.now(), kind, text, role, rank))

    def add_process(self, role: str, pid: int, rank: int = 0) -> None:
        process = events.Process(role, rank, pid, platform.node())
        if process not in self.info.processes:
            self.info.processes.append(process)

    def write_info(self) -> None:
        if not self.silent:
            self.recorder.write_info()

    def write_numbers(self, workers: int, servers: int) -> None:
        """There are to be so many: ``paceline resume`` goes on with as many as there were last."""
        self.info.workers, self.info.servers = workers, servers
        self.write_info()
        job = replace(self._job, workers=workers, servers=servers)
        text = config_file.dump(job, self._setup.script or None, self._setup.args)
        (self.directory / "config.toml").write_text(text)

    def started(self) -> None:
        """All processes are there; or another launcher tells of them from here on."""
        if not self.silent:
            self._log = _Tail(self.directory / "logs" / "worker-0.log", self._shown_output)
        self.record(events.Started(str(self.directory), self.info.processes))

    def flush(self) -> None:
        """Have shown what is ready to be."""
        for metric in self.merger.ready():
            self.record(metric)
        self.recorder.flush()

    def show_output(self, *, last: bool = False) -> None:
        text = self._log.read(last=last) if self._log else ""
        if self._log is not None and text:
            self.recorder.flush()
            self.show("output", self._log.place, [events.Output(text)])

    # --- the end ---

    def conclude(self, reason: str, failure: Failure | None) -> messages.Outcome:
        """How the run has ended: for ``reason``, or by a failure."""
        for metric in self.merger.ready(everything=True):
            self.recorder.take(metric)
        for worker, dropped in sorted(self.merger.dropped.items()):
            text = f"worker {worker} was late {dropped} {'time' if dropped == 1 else 'times'}: its samples came again"
            self.note_now("late", text, "worker", worker)
        self.show_output(last=True)
        if self._log is not None:
            self._log.close()
        begun_s = (self.merger.begun_s or self.started_s) - self.started_s
        if failure is None:
            return messages.Outcome(msgspec.json.encode(self.recorder.close("done", reason, 0, begun_s)), None)
        role, rank, failed = failure
        if failed.traceback:
            log = self.directory / "logs" / f"{role}-{rank}.log"
            with log.open("a") as lines:
                lines.write(failed.traceback)
        status = "interrupted" if failed.kind == "Interrupted" else "failed"
        exit_code = errors.kind_of(failed.kind).exit_code
        summary = self.recorder.close(status, failed.what, exit_code, begun_s)
        return messages.Outcome(msgspec.json.encode(summary), failed)


class _Tail:
    """Reads what a growing text file has got since the last look, in whole lines."""

    def __init__(self, path: Path, start: int) -> None:
        self._file: IO[bytes] = path.open("rb")
        self._file.seek(start)
        self._rest = b""

    def read(self, *, last: bool = False) -> str:
        data = self._rest + self._file.read()
        cut = len(data) if last else data.rfind(b"\n") + 1
        self._rest = data[cut:]
        return data[:cut].decode(errors="replace")

    @property
    def place(self) -> int:
        """Behind the last that was read, in bytes."""
        return self._file.tell() - len(self._rest)

    def close(self) -> None:
        self._file.close()
