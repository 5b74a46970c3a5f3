"""The face of a run: header, progress, the script's own output, and how it ended.

The last stage of the records' way: the engine hands each to ``Console.__call__``. On a terminal one line
is redrawn in place, ten times a second at most; elsewhere a line is added every ten seconds. It is drawn
when a record arrives and by no thread of its own, because the launcher forks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console as Screen
from rich.text import Text

import paceline
from paceline.cli import figures
from paceline.cli.host import machine
from paceline.cli.progress import Progress, Standing
from paceline.config import Job
from paceline.events import Epoch, Metric, Notice, Output, Record, Started, Summary, Wrapped

REDRAW_S = 0.1
PLAIN_LINE_S = 10.0
BAR_CELLS = 20
MOST_VALUES = 3  # of what a script logs beside the loss
ERASE = "\r\x1b[2K\x1b[0m"  # to the line's start, all of it away, and no colour that the script left on
SENT_WHERE, SENT = "sent 0 MB (shared memory)", "sent 0 MB"
SILENT = {"join", "leave", "failed", "died"}  # what every healthy run has, and what the error block will say


class Console:
    """``screen`` takes our own lines, ``output`` what the script prints; they may be the same stream.

    With ``live`` the progress is redrawn in place. ``quiet`` leaves only the script's output.
    """

    def __init__(
        self,
        job: Job,
        screen: Screen,
        output: TextIO,
        *,
        live: bool,
        quiet: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job, self._screen, self._output, self._quiet, self._now = job, screen, output, quiet, now
        self._live = live and not quiet
        self._same = screen.file is output or (screen.file.isatty() and output.isatty())
        self.progress = Progress(job)
        self._due_s = now() + (REDRAW_S if live else PLAIN_LINE_S)
        self._drawn = ""  # the progress line as it stands on the screen
        self._held = ""  # a line that the script has not finished, while a progress line is on the screen
        self._stale = False  # whether rounds came that the progress line does not show
        self._at_start = True  # whether the last character that the script printed ended a line
        self.summary: Summary | None = None
        self.directory: str | None = None

    def __call__(self, record: Record) -> None:
        match record:
            case Metric():
                self.progress.add(record)
                self._stale = True
                self._tick()
            case Output():
                self._print(record.text)
                if self._live and self._stale:
                    self._tick()  # the last round may have come too soon after the one before to be drawn
            case Epoch():
                self.progress.epoch_begins(record)
            case Started():
                self.directory = record.directory
                self.say(f"run {figures.shown(Path(record.directory))}")
            case Wrapped():
                self.say(f"{self._job.name} · {model(record)}")
            case Notice():
                # A death that ends the run is told by its error; one that others go on after has more to say.
                if record.kind not in SILENT or (record.kind == "died" and "; " in record.text):
                    self.say(f"{figures.duration(record.time_s)}: {record.text}")
            case Summary():
                self.summary = record
                self.settle()

    def say(self, *lines: str | Text) -> None:
        """Prints lines of ours, above the progress line. Nothing if quiet."""
        if self._quiet:
            return
        self._erase()
        if self._same:
            self.end_line()
        for line in lines:
            self._screen.print(line, soft_wrap=True)
        self._restore()

    def settle(self) -> None:
        """Takes the progress line away for good, and prints what was held back because of it."""
        self._erase()
        self._drawn, self._live = "", False
        held, self._held = self._held, ""
        self._print(held)

    def end_line(self) -> None:
        """Ends the line that the script left open, if it did."""
        if not self._at_start:
            self._print("\n")

    def _tick(self) -> None:
        now = self._now()
        if now < self._due_s or self._quiet:
            return
        self._stale = False
        if self._live:
            self._due_s = now + REDRAW_S
            with self._screen.capture() as capture:
                self._screen.print(live_line(self.progress.look(), self._screen.width - 1), end="")
            self._drawn = capture.get()
            self._screen.file.write(ERASE + self._drawn)
            self._screen.file.flush()
        elif self._at_start or not self._same:
            self._due_s = now + PLAIN_LINE_S
            self._screen.print(plain_line(self.progress.look()), soft_wrap=True)

    def _print(self, text: str) -> None:
        """The script's text, unchanged. Below a live line only whole lines are printed."""
        if self._live and self._same:
            whole, newline, self._held = (self._held + text).rpartition("\n")
            text = whole + newline
        if not text:
            return
        self._erase()
        self._output.write(text)
        self._output.flush()
        self._at_start = text.endswith("\n")
        self._restore()

    def _erase(self) -> None:
        if self._drawn:
            self._screen.file.write(ERASE)
            self._screen.file.flush()

    def _restore(self) -> None:
        if self._drawn:
            self._screen.file.write(self._drawn)
            self._screen.file.flush()


def header(job: Job) -> str:
    version = paceline.__version__.removesuffix(".0")
    workers = figures.plural(job.workers, "worker")
    servers = figures.plural(job.servers, "server") if job.servers else ""
    if job.engine == "local":
        processes = f"{workers} and {servers} on" if servers else f"{workers} on"
    else:
        processes = f"{workers} started by {'Ray' if job.engine == 'ray' else job.engine}, "
        if job.server_hosts > 1:
            processes += f"{servers} on {job.server_hosts} hosts, home on"
        else:
            processes += f"{servers} and home {'alone ' * job.servers_apart}on" if servers else "home on"
    return f"paceline {version} · {processes} this machine ({machine()}) · pace {job.pace} · engine {job.engine}"


def model(record: Wrapped) -> str:
    size = figures.size(record.size_bytes)
    return f"{figures.count(record.parameters)} parameters · {record.optimizer} · {size} of shared memory"


def live_line(standing: Standing, width: int) -> Text:
    """The progress line, at most ``width`` cells, with as much said beside a bar as there is room for."""
    fullest, shorter, shortest = ("  ".join(_facts(standing, sent)) for sent in (SENT_WHERE, SENT, ""))
    line = Text(standing.label, style="bold", no_wrap=True)
    room = width - len(standing.label) - 2
    for facts in (fullest, shorter):
        cells = min(BAR_CELLS, room - 1 - len(facts))
        if standing.share is not None and cells >= BAR_CELLS // 2:
            halves = round(standing.share * cells * 2)
            full = "━" * (halves // 2) + "╸" * (halves % 2)
            rest = "━" * (cells - len(full))
            line.append(f" {full}", style="not bold cyan").append(rest, style="not bold bright_black")
            break
    else:
        facts = next((facts for facts in (fullest, shorter) if len(facts) <= room), shortest)
    line.append(f"  {facts}", style="not bold")
    line.truncate(max(width, 1), overflow="ellipsis")
    return line


def plain_line(standing: Standing) -> str:
    return "  ".join([standing.label, *_facts(standing, SENT_WHERE)])


def _facts(standing: Standing, sent: str) -> list[str]:
    """``sent`` is how to write that nothing left the host's memory; empty: say nothing of bytes."""
    share = standing.share
    facts = [f"{figures.percent(share):>5}" if share is not None else f"step {standing.done:,}"]
    if standing.loss is not None:
        facts.append(f"loss {figures.loss(standing.loss)}")
    if sent == SENT_WHERE:
        facts += others(standing.values)
    facts.append(f"{figures.rate(standing.samples_per_s)} samples/s")
    if sent:
        facts.append(f"sent {figures.size(standing.bytes_sent)}" if standing.bytes_sent else sent)
    if standing.left_s is not None:
        facts.append(f"ETA {figures.clock(standing.left_s)}")
    return facts


def others(values: Mapping[str, float | None]) -> list[str]:
    """What a script has logged beside the loss, of many the last."""
    return [f"{name} {figures.number(value)}" for name, value in [*values.items()][-MOST_VALUES:]]


def ending(summary: Summary, *more: str) -> str:
    """``done in 0:58 · loss 1.98 · waited 4 % of the time``, with ``more`` after the loss."""
    verb = "done in" if summary.status == "done" else f"{summary.status} after"
    parts = [f"{verb} {figures.duration(summary.seconds)}"]
    if summary.loss is not None:
        parts.append(f"loss {figures.loss(summary.loss)}")
    parts += [*others(summary.values), *more]
    if summary.steps:
        if summary.samples or not summary.seconds:
            parts.append(f"{figures.rate(summary.samples_per_s)} samples/s")
        else:  # a script without a wrapped loader
            parts.append(f"{figures.rate(summary.steps / summary.seconds)} steps/s")
        parts.append(f"waited {figures.percent(summary.waiting)} of the time")
        if summary.staleness >= 0.05:
            parts.append(f"staleness {summary.staleness:.1f}")
        if summary.dropped:
            parts.append(f"{summary.dropped:,} pushes came late")
    else:
        parts.append("no step was recorded")
    return " · ".join(parts)
