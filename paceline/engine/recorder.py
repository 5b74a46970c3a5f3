"""The run directory: every record of a run as a file, written as it happens.

run.json  config.toml  metrics.jsonl  events.jsonl  summary.json  logs/  plots/
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from array import array
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec

from paceline import events
from paceline.config import Job
from paceline.errors import HostError

_FLUSH_RECORDS = 256


class Recorder:
    """Owns a new run directory for ``job``; passes every record on to ``watch``. Raises HostError.

    ``resume``: the directory of an earlier run of the job and the step to go on behind; what it had recorded of later
    ones is dropped. ``offset_s`` is where that run's clock stood.
    """

    def __init__(
        self,
        job: Job,
        watch: Callable[[events.Record], None],
        argv: Sequence[str],
        resume: tuple[Path, int] | None = None,
    ) -> None:
        self._job, self._watch = job, watch
        self.directory = _new_directory(job) if resume is None else resume[0]
        for name in ("logs", "plots"):
            (self.directory / name).mkdir(exist_ok=True)
        self._encoder = msgspec.json.Encoder()
        kept = _metrics_up_to(self.directory / "metrics.jsonl", resume[1]) if resume is not None else []
        _replace(self.directory / "metrics.jsonl", b"".join(self._encoder.encode(metric) + b"\n" for metric in kept))
        self._metrics: IO[bytes] = (self.directory / "metrics.jsonl").open("ab")
        self._events: IO[bytes] = (self.directory / "events.jsonl").open("ab", buffering=0)
        self._unflushed = 0
        self._losses = array("d")
        self._totals = [0.0, 0.0, 0.0]
        self._samples = self._steps = self._epochs = self._bytes = 0
        self._last_s = self._staleness = 0.0
        self._lines = self._dropped = 0
        for metric in kept:
            self._count(metric)
        self.offset_s = self._last_s
        self._before_s = self._last_s - kept[0].time_s if kept else 0.0
        self.info = events.RunInfo(
            run=self.directory.name,
            status="starting",
            argv=list(argv),
            seed=job.seed,
            pace=str(job.pace),
            workers=job.workers,
            servers=job.servers,
            git=_commit(),
            machines=[{"host": platform.node(), "cores": os.cpu_count() or 0, "system": platform.system()}],
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        self.write_info()

    def write_info(self) -> None:
        _replace(self.directory / "run.json", self._encoder.encode(self.info))

    def write_config(self, text: str) -> None:
        (self.directory / "config.toml").write_text(text)

    def take(self, record: events.Record) -> None:
        """Write a record where it belongs and show it to the watcher."""
        if isinstance(record, events.Metric):
            self._metrics.write(self._encoder.encode(record) + b"\n")
            self._unflushed += 1
            if self._unflushed >= _FLUSH_RECORDS:
                self.flush()
            self._count(record)
        elif isinstance(record, events.Notice | events.Wrapped | events.Epoch):
            self._events.write(self._encoder.encode(record) + b"\n")
        self._watch(record)

    def flush(self) -> None:
        if self._unflushed:
            self._metrics.flush()
            self._unflushed = 0

    def close(self, status: str, reason: str, exit_code: int, begun_s: float) -> events.Summary:
        """Write summary.json and the last run.json. ``begun_s``: when the first batch began, as in records."""
        seconds = max(self._last_s - begun_s, 0.0) + self._before_s if self._steps else 0.0
        busy = sum(self._totals)
        tail = self._losses[-max(1, len(self._losses) // 20) :]
        summary = events.Summary(
            run=str(self.directory),
            status=status,
            pace=str(self._job.pace),
            workers=self._job.workers,
            servers=self._job.servers,
            steps=self._steps,
            samples=self._samples,
            seconds=round(seconds, 6),
            samples_per_s=round(self._samples / seconds, 3) if seconds else 0.0,
            loss=sum(tail) / len(tail) if tail else None,
            waiting=round(self._totals[1] / busy, 4) if busy else 0.0,
            bytes_sent=self._bytes,
            epochs=self._epochs,
            reason=reason,
            exit_code=exit_code,
            staleness=round(self._staleness / self._lines, 3) if self._lines else 0.0,
            dropped=self._dropped,
        )
        self._metrics.close()
        _replace(self.directory / "summary.json", self._encoder.encode(summary))
        self.info.status, self.info.exit_code = status, exit_code
        self.write_info()
        self._watch(summary)
        self._events.close()
        return summary

    def abandon(self, reason: str) -> None:
        """The launcher itself cannot go on: leave files that say so, and tell no watcher."""
        self._watch = lambda record: None
        self.close("failed", reason, 1, 0.0)

    def _count(self, metric: events.Metric) -> None:
        self._steps = metric.step
        self._lines += 1
        self._staleness += metric.staleness
        self._dropped += metric.dropped
        self._samples += metric.samples
        self._epochs = max(self._epochs, metric.epoch)
        self._bytes += metric.bytes_sent
        self._last_s = max(self._last_s, metric.time_s)
        if metric.loss is not None:
            self._losses.append(metric.loss)
        for place, value in enumerate((metric.computing_s, metric.waiting_s, metric.exchanging_s)):
            self._totals[place] += value


def _metrics_up_to(path: Path, step: int) -> list[events.Metric]:
    """The records of a run up to a step; a line cut short is passed over."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                metric = msgspec.json.decode(line, type=events.Metric)
                if metric.step <= step:
                    found.append(metric)
    return found


def _new_directory(job: Job) -> Path:
    stem = f"{datetime.now():%Y%m%d-%H%M}-{job.name}-{str(job.pace).replace(':', '')}"
    try:
        job.runs.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = job.runs / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise HostError(
            f"cannot make a run directory in {job.runs}: {error.strerror}",
            fix="choose another with --run-dir",
        ) from None
    raise HostError(f"{job.runs} holds 10,000 runs of this minute", fix="choose another with --run-dir")


def _replace(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
