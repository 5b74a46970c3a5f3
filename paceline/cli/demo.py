"""``paceline demo``: trains one of the examples that come with paceline, and says what was gained.

The gain is measured, not assumed: for ``text`` (others with --compare) one process first runs the same
script for a few rounds. Both speeds leave out the first rounds, in which memory is touched for the
first time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import paceline
from paceline.cli import answers, figures
from paceline.cli.failure import nearest
from paceline.cli.host import cores
from paceline.cli.options import JobFlags, ShowFlags, resolve
from paceline.cli.run import Ending, Engine, train
from paceline.config import Job
from paceline.engine.program import Script
from paceline.errors import HostError, UsageError
from paceline.events import Metric, Record, Summary

if TYPE_CHECKING:
    from paceline.cli.console import Console

WORKERS = {"text": 2, "linear": 5, "digits": 2}
NEXT = {
    "text": "paceline demo linear",
    "linear": "paceline demo digits",
    "digits": "paceline run your_script.py",
}
TRIAL_ROUNDS = 25
WARM_UP_ROUNDS = 5


class Speed:
    """Samples a second over the rounds seen, without the first few: a watcher of records."""

    def __init__(self) -> None:
        self._rounds, self._samples = 0, 0
        self._first_s, self._last_s = 0.0, 0.0

    def __call__(self, record: Record) -> None:
        if not isinstance(record, Metric):
            return
        self._rounds += 1
        self._last_s = record.time_s
        if self._rounds <= WARM_UP_ROUNDS:
            self._first_s = record.time_s
        else:
            self._samples += record.samples

    @property
    def samples_per_s(self) -> float | None:
        """None while nothing can be said."""
        seconds = self._last_s - self._first_s
        return self._samples / seconds if self._samples and seconds > 0 else None


def run_demo(
    name: str | None, args: tuple[str, ...], flags: JobFlags, show: ShowFlags, compare: bool, engine: Engine
) -> int:
    """The command ``demo``; returns the exit code."""
    name = name or "text"
    program = Script(example(name), args)
    settings = resolve(flags, os.environ, defaults={"workers": WORKERS[name]})
    job = settings.job(name)
    if show.dry_run:
        return answers.dry_run(job, program, settings, show)
    if not (compare or name == "text") or job.workers == 1:
        return train(job, program, show, engine, ending=lambda summary: Ending(next=NEXT[name]))

    alone: list[float | None] = []
    here = Speed()

    def watched(job: Job, program: Script, *, watch, argv) -> Summary:  # type: ignore[no-untyped-def]
        return engine(job, program, watch=lambda record: (here(record), watch(record))[1], argv=argv)

    def before(console: Console) -> None:
        console.say("measuring one process first")
        alone.append(speed_alone(job, program, engine))

    return train(
        job, program, show, watched, before=before, ending=lambda _: gained(alone[0], here.samples_per_s, job, name)
    )
