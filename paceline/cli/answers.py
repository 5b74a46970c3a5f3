"""What commands answer besides a run: JSON objects, the resolved job, and which stream takes what."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from paceline.cli import figures
from paceline.cli.host import cores
from paceline.cli.options import OPTIONS, Settings, ShowFlags, job_field
from paceline.config import Job
from paceline.engine.program import Script
from paceline.errors import PacelineError
from paceline.events import Summary

if TYPE_CHECKING:
    from rich.console import Console as Screen
    from rich.table import Table

    from paceline.cli.console import Console


def screen(show: ShowFlags) -> Screen:
    """Where our own lines go: stdout, or stderr where stdout is for a program to read."""
    from rich.console import Console as Screen

    return Screen(file=sys.stderr if show.json else sys.stdout, highlight=False, markup=False, emoji=False)


def console(job: Job, show: ShowFlags) -> Console:
    from paceline.cli.console import Console

    ours = screen(show)
    still = any(os.environ.get(name) for name in ("CI", "NO_COLOR")) or ours.is_dumb_terminal
    return Console(job, ours, sys.stdout, live=ours.file.isatty() and not still, quiet=show.quiet)


def print_whole(table: Table, screen: Screen) -> None:
    """A narrow terminal, or none, gets long lines and not folded ones: names and paths are there to be copied."""
    screen.width = max(screen.width, screen.measure(table, options=screen.options.update(width=10_000)).maximum)
    screen.print(table, crop=False)


def print_json(value: object) -> None:
    """One line of stdout. What is not a number is null."""
    print(msgspec.json.encode(value).decode(), flush=True)


def result(
    job: Job | None, summary: Summary | None, failure: PacelineError | None, keys: Mapping[str, object]
) -> dict[str, object]:
    """What ``--json`` prints of a run: its Summary, or nulls and the failure if it never came to one."""
    answer: dict[str, object] = dict.fromkeys(Summary.__struct_fields__)
    if job is not None:
        answer |= {"pace": str(job.pace), "workers": job.workers, "servers": job.servers}
    if summary is not None:
        answer |= {key: getattr(summary, key) for key in answer}
    answer |= keys
    if failure is not None:
        status = answer["status"] if answer["status"] not in (None, "done") else "failed"
        answer |= {"status": status, "error": failure.what, "exit_code": failure.exit_code}
    return answer


def dry_run(job: Job, program: Script, settings: Settings, show: ShowFlags) -> int:
    """Says what would run and where each value came from."""
    if show.json:
        command = {"script": str(program.path), "args": list(program.args)}
        print_json({"status": "dry-run", **command, "job": plain(job), "sources": dict(settings.sources)})
        return 0
    ours = screen(show)
    print_whole(_table(job, settings), ours)
    threads = job.threads or (max(1, cores() // job.workers) if job.engine == "local" else 1)
    processes = f"{figures.plural(job.workers, 'worker')} of {figures.plural(threads, 'thread')}"
    if job.servers:
        processes += f" and {figures.plural(job.servers, 'server')}"
    command_line = " ".join([str(program.path), *program.args])
    starts = "would start" if job.engine == "local" else "would have Ray start"
    ours.print(f"{starts} {processes}, each worker running: {command_line}", soft_wrap=True)
    ours.print(f"would write {job.runs}/<time>-{job.name}-{job.pace}", soft_wrap=True)
    ours.print("nothing was started", soft_wrap=True)
    return 0


def show_settings(settings: Settings, show: ShowFlags) -> int:
    """``config show``: every value of a job and its source."""
    job = settings.job("-")
    if show.json:
        values = plain(job)
        sources = settings.sources
        print_json({key: {"value": values[key], "source": sources[key]} for key in sources})
    else:
        print_whole(_table(job, settings), screen(show))
    return 0


def plain(job: Job) -> dict[str, Any]:
    """The job's fields as JSON has them."""
    values = {field: getattr(job, field) for field in ("name", *map(job_field, OPTIONS))}
    return {key: str(value) if key in ("pace", "runs") else value for key, value in values.items()}


def _table(job: Job, settings: Settings) -> Table:
    from rich.table import Table

    table = Table("key", "value", "from", box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for key, source in settings.sources.items():
        value = getattr(job, key)
        table.add_row(key, "-" if value is None else str(value), source)
    return table
