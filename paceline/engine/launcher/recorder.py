"""The run directory: every record of a run as a file, written as it happens.

run.json  config.toml  metrics.jsonl  events.jsonl  summary.json  logs/  plots/
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec

from paceline import events
from paceline.config import Job
from paceline.engine.launcher.losses import Losses
from paceline.errors import HostError

_FLUSH_RECORDS = 256
_CHUNK = 1 << 16


class Recorder:
    """Writes the files of the run of ``job`` in ``directory``, and has every record shown.

    ``resume``: the step behind which a run is resumed; what was recorded of later ones is dropped. ``again``: another
    process has begun to record this run and has ended; all that it wrote stays. ``offset_s`` is where the clock of the
    run that is resumed stood. ``show`` gets a file of the run, or "", how far it is written, and the records.
    """

    def __init__(
        self,
        job: Job,
        directory: Path,
        show: Callable[[str, int, list[events.Record]], None],
        argv: Sequence[str],
        resume: int | None = None,
        *,
        again: bool = False,
    ) -> None:
        self._job, self._show, self.directory = job, show, directory
        for name in ("logs", "plots"):
            (self.directory / name).mkdir(exist_ok=True)
        self._encoder = msgspec.json.Encoder()
        metrics, told = self.directory / "metrics.jsonl", self.directory / "events.jsonl"
        if again:
            for path in (metrics, told):
                _cut_to_whole_lines(path)
        else:
            kept = _metrics_up_to(metrics, resume) if resume is not None else iter(())
            _replace(metrics, (self._encoder.encode(metric) + b"\n" for metric in kept))
        self._metrics: IO[bytes] = metrics.open("ab", buffering=0)
        self._events: IO[bytes] = told.open("ab", buffering=0)
        self._unwritten: list[tuple[bytes, events.Metric]] = []
        self._have: set[bytes] = set()  # lines that may be told again, and are there
        self._losses = Losses()
        self._totals = [0.0, 0.0, 0.0]
        self._samples = self._steps = self._epochs = self._bytes = 0
        self._last_s = self._staleness = 0.0
        self._values: dict[str, float | None] = {}  # as they were last
        self._lines = self._dropped = 0
        before: list[float] = []  # the first and the last time in the run that is resumed
        for metric in _metrics_up_to(metrics, None):
            self._count(metric)
            if resume is not None and metric.step <= resume:
                before = [before[0], max(before[1], metric.time_s)] if before else 2 * [metric.time_s]
        self.offset_s = before[1] if before else 0.0
        self._before_s = self.offset_s - before[0] if before else 0.0
        known = _info(self.directory / "run.json") if again else None
        self.info = known or events.RunInfo(
            run=self.directory.name,
            status="starting",
            argv=list(argv),
            seed=job.seed,
            pace=str(job.pace),
            workers=job.workers,
            servers=job.servers,
            engine=job.engine,
            git=_commit(),
            machines=[{"host": platform.node(), "cores": os.cpu_count() or 0, "system": platform.system()}],
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        self.write_info()

    def write_info(self) -> None:
        _replace(self.directory / "run.json", [self._encoder.encode(self.info)])

    @property
    def places(self) -> dict[str, int]:
        """How far the files are written, in bytes."""
        self.flush()
        return {"metrics": self._metrics.tell(), "events": self._events.tell()}

    def expect(self, places: dict[str, int]) -> None:
        """What was recorded since the files were written so far may be taken once more; it is not written twice."""
        for file in (self._metrics, self._events):
            with Path(file.name).open("rb") as lines:
                lines.seek(places[_stem(file)])
                self._have.update(lines)

    def show_since(self, places: dict[str, int]) -> list[events.Record]:
        """Show what the files have from these places on; these records."""
        shown: list[events.Record] = []
        for file in (self._metrics, self._events):
            with Path(file.name).open("rb") as lines:
                lines.seek(places.get(_stem(file), 0))
                records = [msgspec.json.decode(line, type=events.Record) for line in lines]
                self._show(_stem(file), file.tell(), records)
                shown += records
        return shown

    def take(self, record: events.Record) -> None:
        """Write a record where it belongs and have it shown; metrics with the next ``flush``, or other record."""
        if isinstance(record, events.Metric):
            line = self._encoder.encode(record) + b"\n"
            if line in self._have:
                return
            self._unwritten.append((line, record))
            self._count(record)
            if len(self._unwritten) >= _FLUSH_RECORDS:
                self.flush()
            return
        self.flush()
        if isinstance(record, events.Notice | events.Wrapped | events.Epoch):
            line = self._encoder.encode(record) + b"\n"
            if line in self._have:
                return
            self._events.write(line)
            self._show("events", self._events.tell(), [record])
        else:
            self._show("", 0, [record])

    def flush(self) -> None:
        if self._unwritten:
            unwritten, self._unwritten = self._unwritten, []
            self._metrics.write(b"".join(line for line, _ in unwritten))
            self._show("metrics", self._metrics.tell(), [metric for _, metric in unwritten])

    def close(self, status: str, reason: str, exit_code: int, begun_s: float) -> events.Summary:
        """Write summary.json and the last run.json. ``begun_s``: when the first batch began, as in records."""
        seconds = max(self._last_s - begun_s, 0.0) + self._before_s if self._steps else 0.0
        busy = sum(self._totals)
        summary = events.Summary(
            run=str(self.directory),
            status=status,
            pace=str(self._job.pace),
            workers=self.info.workers,
            servers=self.info.servers,
            steps=self._steps,
            samples=self._samples,
            seconds=round(seconds, 6),
            samples_per_s=round(self._samples / seconds, 3) if seconds else 0.0,
            loss=self._losses.last(),
            waiting=round(self._totals[1] / busy, 4) if busy else 0.0,
            bytes_sent=self._bytes,
            epochs=self._epochs,
            reason=reason,
            exit_code=exit_code,
            staleness=round(self._staleness / self._lines, 3) if self._lines else 0.0,
            dropped=self._dropped,
            values=self._values,
        )
        self.flush()
        self._metrics.close()
        _replace(self.directory / "summary.json", [self._encoder.encode(summary)])
        self.info.status, self.info.exit_code = status, exit_code
        self.write_info()
        self._show("", 0, [summary])
        self._events.close()
        return summary

    def abandon(self, reason: str) -> None:
        """The launcher itself cannot go on: leave files that say so, and tell no watcher."""
        self._show = lambda file, place, records: None
        self.close("failed", reason, 1, 0.0)

    def _count(self, metric: events.Metric) -> None:
        self._steps = metric.step
        self._lines += not events.is_behind(metric)
        self._values |= metric.values
        self._staleness += metric.staleness
        self._dropped += metric.dropped
        self._samples += metric.samples
        self._epochs = max(self._epochs, metric.epoch)
        self._bytes += metric.bytes_sent
        self._last_s = max(self._last_s, metric.time_s)
        if metric.loss is not None:
            self._losses.add(metric.loss)
        for place, value in enumerate((metric.computing_s, metric.waiting_s, metric.exchanging_s)):
            self._totals[place] += value


def _stem(file: IO[bytes]) -> str:
    return Path(file.name).stem


def _info(path: Path) -> events.RunInfo | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=events.RunInfo)
    except (OSError, msgspec.DecodeError):
        return None


def _cut_to_whole_lines(path: Path) -> None:
    """Its writer may have been killed in the middle of one."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        whole = size = file.seek(0, os.SEEK_END)
        while whole and whole == size:
            size = max(0, size - _CHUNK)
            file.seek(size)
            whole = size + file.read(_CHUNK).rfind(b"\n") + 1
        file.truncate(whole)


def _metrics_up_to(path: Path, step: int | None) -> Iterator[events.Metric]:
    """The records of a run, if ``step`` is given those up to it; a line cut short is passed over."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                metric = msgspec.json.decode(line, type=events.Metric)
                if step is None or metric.step <= step:
                    yield metric


def new_directory(job: Job) -> Path:
    """Make the directory of a new run. Raises HostError."""
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


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
    temporary.replace(path)


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
