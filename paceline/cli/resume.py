"""Which checkpoint a run goes on from, for the command ``resume`` and for whoever starts workers elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paceline import config_file
from paceline.cli import answers
from paceline.cli.options import JobFlags, ShowFlags, resolve
from paceline.cli.run import ResumingEngine, chosen, train, train_by_ray
from paceline.engine.checkpoint.checkpoints import Checkpoints, Loaded
from paceline.errors import PacelineError, UsageError
from paceline.report.runs import GOING_ON, RunFiles, find_run, is_alive, list_runs

if TYPE_CHECKING:
    from paceline.cli.console import Console

VARIABLE = "PACELINE_RESUME"
LAST = "last"


def resume_run(wanted: str | None, flags: JobFlags, show: ShowFlags, folder: Path, engine: ResumingEngine) -> int:
    """The command ``resume``; returns the exit code."""
    found = find_run(folder, wanted) if wanted is not None else _newest(folder)
    settings = resolve(flags, os.environ, str(found.directory / "config.toml"))
    program = chosen(None, (), settings)
    job = settings.job(program.path.stem)
    if job.engine == "torchrun":
        raise UsageError(
            f"the workers of run {found.name!r} were started by torchrun",
            why="paceline resume starts those that it resumes",
            fix=f"{VARIABLE}={found.name} torchrun ..., as it was started; or here, with --engine local",
        )
    loaded = _checkpoint(found)
    if show.dry_run:
        return answers.dry_run(job, program, settings, show)
    before = partial(tell, loaded, is_done=found.status == "done")
    if job.engine == "ray":
        return train_by_ray(job, program, show, loaded, before=before)
    return train(job, program, show, partial(engine, resume=loaded), before=before)


def asked_for(environment: Mapping[str, str], script: Path, folder: Path) -> Loaded | None:
    """What PACELINE_RESUME names in this folder: a run, or ``last``, the newest of this script that has a checkpoint.
    None: a new run, also where the newest is done. Runs that cannot be looked at are told of and passed over.
    Raises UsageError, ConfigError."""
    wanted = environment.get(VARIABLE)
    if not wanted:
        return None
    if wanted != LAST:
        return _checkpoint(find_run(folder, wanted))
    for found in reversed(list_runs(folder)):
        if Checkpoints(found.directory).paths() and _is_readable(found) and _is_of(found, script):
            if found.status != "done":
                return _checkpoint(found)
            print(f"note: run {found.name!r} is done, so {VARIABLE}={LAST} begins a new one", file=sys.stderr)
            return None
    print(f"note: no run of {script.name} has a checkpoint, so {VARIABLE}={LAST} begins a new one", file=sys.stderr)
    return None


def directory_of(loaded: Loaded) -> Path:
    """Of the run that has made it."""
    return loaded.path.parent.parent


def tell(loaded: Loaded, console: Console, *, is_done: bool = False) -> None:
    for warning in loaded.warnings:
        console.say(f"warning: {warning}; the one before it is used")
    if is_done:
        console.say("note: the run is done; it is trained anew from its checkpoint on, and further with --epochs N")
    console.say(f"goes on behind step {loaded.step}, saved {loaded.time}")


def _checkpoint(found: RunFiles) -> Loaded:
    info = found.info
    if info is not None and info.status in GOING_ON and is_alive(info):
        raise UsageError(f"run {found.name!r} is still going on", fix="end it with Ctrl-C first: it saves a checkpoint")
    checkpoints = Checkpoints(found.directory)
    if found.status == "done" and not checkpoints.paths():
        raise UsageError(
            f"run {found.name!r} is done and has left no checkpoint: there is nothing to go on with",
            fix=f"paceline runs show {found.name}; to train on behind a run, give it --checkpoint-every N",
        )
    return checkpoints.load()


def _newest(folder: Path) -> RunFiles:
    """But for those that cannot be looked at, if there are others; they are told of."""
    return next(filter(_is_readable, reversed(list_runs(folder))), None) or find_run(folder, None)


def _is_readable(found: RunFiles) -> bool:
    """Is its config.toml? If it is not, why is told."""
    path = found.directory / "config.toml"
    try:
        if path.is_file():
            config_file.load(path)
    except (PacelineError, OSError) as error:
        told = error.what if isinstance(error, PacelineError) else f"{path}: {error.strerror}"
        print(f"note: run {found.name!r} is passed over: {told}", file=sys.stderr)
        return False
    return True


def _is_of(found: RunFiles, script: Path) -> bool:
    path = found.directory / "config.toml"
    known = config_file.load(path).get("script") if path.is_file() else None
    return isinstance(known, str) and Path(known).resolve() == script.resolve()
