"""``paceline run``: from what was typed to a job, the engine's run of it, and how that is told at the end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from paceline.cli import answers, figures
from paceline.cli.failure import nearest, report
from paceline.cli.fence import misspelt, text_of
from paceline.cli.options import (
    FOR_ELSEWHERE,
    OPTIONS,
    OPTIONS_OF_OURS_ALONE,
    JobFlags,
    Settings,
    ShowFlags,
    flag,
    resolve,
    unknown_variables,
)
from paceline.config import Job
from paceline.engine.program import Script
from paceline.errors import PacelineError, ScriptError, UsageError
from paceline.events import Record, Summary

if TYPE_CHECKING:
    from paceline.cli.console import Console
    from paceline.engine.checkpoint.checkpoints import Loaded


class Engine(Protocol):
    """``paceline.engine.launcher.front.run_local``: runs a job to its end, handing every record to ``watch``."""

    def __call__(
        self, job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]
    ) -> Summary: ...


class ResumingEngine(Protocol):
    """The same, going on from a checkpoint."""

    def __call__(
        self, job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str], resume: Loaded
    ) -> Summary: ...


@dataclass(frozen=True)
class Ending:
    """What a command adds to a run's end: parts of the line, keys of the object, what to try next."""

    parts: tuple[str, ...] = ()
    keys: tuple[tuple[str, object], ...] = ()
    following: str = ""


def run_script(
    script: str | None,
    args: tuple[str, ...],
    flags: JobFlags,
    show: ShowFlags,
    config: str | None,
    engine: Engine,
) -> int:
    """The command ``run``; returns the exit code."""
    settings = resolve(flags, os.environ, config)
    program = chosen(script, args, settings)
    job = settings.job(program.path.stem)
    _check_engine(job, settings)
    if show.dry_run:
        return answers.dry_run(job, program, settings, show)
    if job.engine == "ray":
        return train_by_ray(job, program, show)
    return train(job, program, show, engine)


def only_here(job: Job, command: str) -> None:
    """Raises UsageError where the workers are not to be on this machine."""
    if job.engine != "local":
        raise UsageError(f"engine is {job.engine!r}; {command} trains on this machine", fix="paceline run --engine ray")


def train_by_ray(
    job: Job,
    program: Script,
    show: ShowFlags,
    resume: Loaded | None = None,
    *,
    before: Callable[[Console], None] = lambda console: None,
) -> int:
    """``train``, with workers that Ray starts; ``resume``: it goes on from there."""
    from paceline.run.ray import Cluster

    cluster = Cluster(job, resume)

    def begin(console: Console) -> None:
        before(console)
        cluster.open(console.say)

    try:
        return train(job, program, show, cluster.run, before=begin)
    finally:
        cluster.close()


def _check_engine(job: Job, settings: Settings) -> None:
    """Raises UsageError for what this command does not start. The environment may have more than this run needs."""
    if job.engine == "torchrun":
        raise UsageError(
            "paceline run does not start torchrun; it is the other way round",
            fix="torchrun --nproc-per-node N SCRIPT, and options in the environment: PACELINE_PACE=bounded:4",
        )
    typed = [option for option in FOR_ELSEWHERE if settings.sources[option] == flag(option)]
    if job.engine == "local" and typed:
        raise UsageError(f"{flag(typed[0])} is for workers that come from elsewhere", fix="--engine ray")


def chosen(script: str | None, args: tuple[str, ...], settings: Settings) -> Script:
    """The script that was typed with its arguments, or both from the --config file."""
    if script is None:
        script, args = settings.script, settings.args
    if script is None:
        raise UsageError("no script is given", fix="paceline run your_script.py")
    path = Path(script)
    if path.is_file():
        return Script(path, args)
    if path.is_dir():
        raise UsageError(f"script {script!r} is a folder", fix="name a file in it")
    folder = path.parent
    beside = [str(folder / other.name) for other in folder.glob("*.py")] if folder.is_dir() else []
    raise UsageError(f"script {script!r} does not exist", fix=nearest(script, beside))


def train(
    job: Job,
    program: Script,
    show: ShowFlags,
    engine: Engine,
    *,
    before: Callable[[Console], None] | None = None,
    ending: Callable[[Console], Ending] | None = None,
) -> int:
    """Runs the job and shows it. ``before`` is called under the header, ``ending`` when the run is done."""
    from paceline.cli.console import header

    console = answers.console(job, show)
    console.say(header(job))
    if note := _note_of_strays(program):
        console.say(note)
    for variable, meant in unknown_variables(os.environ):
        said = f"did you mean {meant}?" if meant else "paceline run --help tells what there is"
        console.say(f"note: {variable} is set in the environment and is no option of paceline's; {said}")
    failure: PacelineError | None = None
    more = Ending()
    try:
        if before is not None:
            before(console)
        engine(job, program, watch=console, argv=sys.argv)
        more = ending(console) if ending is not None else more
    except PacelineError as error:
        failure = _pointed_out(error, program)
    finally:
        console.settle()
    with _undisturbed():
        plot = _tell(console, more, job)
        if show.json:
            console.end_line()
            keys = {"plot": plot, **dict(more.keys)}
            answers.print_json(answers.result(job, console.summary, failure, keys))
        if failure is not None:
            console.end_line()
            report(failure, sys.stderr)
    return failure.exit_code if failure is not None else 0


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C comes too late: the run is over, and what is left is to say how it went."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(console: Console, more: Ending, job: Job) -> str | None:
    """The last lines: how it went, the picture, what to do next. Returns the picture's path."""
    from paceline.cli.console import ending
    from paceline.report.plots import loss_plot

    if console.summary is None or console.directory is None:
        return None
    directory = Path(console.directory)
    picture = loss_plot(directory)
    plot = figures.shown(picture) if picture is not None else None
    console.say(ending(console.summary, *more.parts))
    if plot is not None:
        console.say(f"  plot    {plot}")
    if console.summary.status != "done":
        console.say(f"  logs    {figures.shown(directory / 'logs')}")
    console.say(f"  next    {more.following or _next(directory, console.summary, job)}")
    return plot


def _next(directory: Path, summary: Summary, job: Job) -> str:
    """What one would type now."""
    from paceline.engine.checkpoint.checkpoints import Checkpoints

    # As the commands find it: by its name in the usual folder, else by its path.
    run = directory.name if directory.parent == Job.runs else figures.shown(directory)
    if summary.status == "done" or not Checkpoints(directory).paths():
        return f"paceline runs show {run}"
    if job.engine == "torchrun":
        return f"PACELINE_RESUME={run} torchrun ..., as it was started"
    return f"paceline resume {run}"


def _note_of_strays(program: Script) -> str:
    """Of what goes to the script and may have been meant for us; nothing if nothing looks so."""
    before = "paceline's options stand before it"
    if stray := _strays(program, OPTIONS_OF_OURS_ALONE):
        return f"note: {stray[0]} stands after the script and goes to it; {before}"
    if found := misspelt(program.args, text_of(str(program.path))):
        typed, meant = found
        return f"note: {typed} stands after the script and goes to it; {before}: did you mean {meant}?"
    return ""


def _strays(program: Script, options: Sequence[str]) -> list[str]:
    """What was given to the script and looks like one of these options."""
    ours = {flag(option) for option in options}
    return [arg for arg in program.args if arg.partition("=")[0] in ours]


def _pointed_out(error: PacelineError, program: Script) -> PacelineError:
    """Adds to a script's failure that it was given options which look like ours."""
    if not isinstance(error, ScriptError) or error.fix:
        return error
    if strays := _strays(program, OPTIONS):
        error.fix = (
            f"{strays[0]} stands after the script and so was given to it; if it was meant for paceline,"
            f" write it before: paceline run {strays[0]} ... {program.path}"
        )
    elif found := misspelt(program.args, text_of(str(program.path))):
        typed, meant = found
        error.fix = (
            f"{typed} was given to the script; if it was meant for paceline: paceline run {meant} ... {program.path}"
        )
    return error
