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
from paceline.cli import answers
from paceline.cli.failure import nearest
from paceline.cli.figures import plural
from paceline.cli.host import cores
from paceline.cli.options import JobFlags, ShowFlags, resolve
from paceline.cli.progress import Progress
from paceline.cli.run import Ending, Engine, only_here, train
from paceline.config import Job, Sync
from paceline.engine.program import Script
from paceline.errors import HostError, UsageError
from paceline.events import Metric, Record

if TYPE_CHECKING:
    from paceline.cli.console import Console

WORKERS = {"text": 2, "linear": 5, "digits": 2}
NEXT = {
    "text": "paceline demo linear",
    "linear": "paceline demo digits",
    "digits": "paceline run your_script.py",
}
TRIAL_STEPS = 25


def run_demo(
    name: str | None, args: tuple[str, ...], flags: JobFlags, show: ShowFlags, compare: bool, engine: Engine
) -> int:
    """The command ``demo``; returns the exit code."""
    name = "text" if name is None else name
    program = Script(example(name), args)
    settings = resolve(flags, os.environ, defaults={"workers": WORKERS[name]})
    job = settings.job(name)
    only_here(job, "paceline demo")
    if show.dry_run:
        return answers.dry_run(job, program, settings, show)
    following = NEXT[name]
    if not (compare or name == "text") or job.workers == 1:
        return train(job, program, show, engine, ending=lambda console: Ending(following=following))
    comparison = Comparison(job, program, engine, following)
    return train(job, program, show, engine, before=comparison.before, ending=comparison.ending)


def example(name: str) -> Path:
    """The script of an example: inside an installed package, beside the package in a checkout."""
    if name not in WORKERS:
        fix = nearest(name, WORKERS) or "options of paceline come before the name, the script's after it"
        raise UsageError(f"demo {name!r} is not known; it must be one of: {', '.join(WORKERS)}", fix=fix)
    package = Path(paceline.__file__).parent
    path = next((path for path in (package / "examples", package.parent / "examples") if path.is_dir()), None)
    if path is None or not (path / f"{name}.py").is_file():
        raise HostError(f"demo {name} is not installed", why=f"{package / 'examples'} lacks {name}.py")
    if name == "digits" and importlib.util.find_spec("sklearn") is None:
        raise HostError("demo digits needs scikit-learn for its data", fix="pip install 'paceline[examples]'")
    return path / f"{name}.py"


class Comparison:
    """The same script by one process for a few rounds, and what the run gained over it."""

    def __init__(self, job: Job, program: Script, engine: Engine, following: str) -> None:
        self._job, self._program, self._engine, self._following = job, program, engine, following
        self._alone: float | None = None

    def before(self, console: Console) -> None:
        console.say("measuring one process first")
        whole = replace(self._job, epochs=None, until_loss=None, patience=None)
        with tempfile.TemporaryDirectory(prefix="paceline-") as folder:
            plain = replace(whole, pace=Sync(), assign=None, data="shared", staleness_damping=False, compensate=None)
            trial = replace(plain, workers=1, servers=0, steps=TRIAL_STEPS, runs=Path(folder))
            progress = Progress(trial)

            def watch(record: Record) -> None:
                if isinstance(record, Metric):
                    progress.add(record)

            self._engine(trial, self._program, watch=watch, argv=sys.argv)
        self._alone = progress.steady_samples_per_s

    def ending(self, console: Console) -> Ending:
        here = console.progress.steady_samples_per_s
        if self._alone is None or here is None:
            return Ending(following=self._following)
        gain = here / self._alone
        part = f"{gain:.1f}x one process"
        if round(gain, 1) < 1:
            part += f": {loss_of_speed(self._job, console.progress.overhead)}"
        elif gain > 1.5 * self._job.workers:  # n workers are no faster than that
            part += ", which other programs have held up in its trial"
        keys = (("one_process_samples_per_s", self._alone), ("speedup", gain))
        return Ending((part,), keys, self._following)


def loss_of_speed(job: Job, overhead: float) -> str:
    """Why a run was slower than one process would have been, as far as its figures tell."""
    if job.workers > cores():
        return f"{plural(job.workers, 'worker')} share {plural(cores(), 'core')}"
    if overhead > 0.2:
        return f"this model is too small to gain from {plural(job.workers, 'worker')}"
    return "one process already keeps the cores busy"
