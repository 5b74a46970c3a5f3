"""``paceline runs list`` and ``runs show``: run directories, for people or as JSON."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console as Screen
from rich.table import Table
from rich.text import Text

from paceline.cli import figures
from paceline.cli.answers import print_json, print_whole
from paceline.errors import UsageError
from paceline.report.runs import RunFiles, find_run, last_notices, list_runs
from paceline.report.series import read_series

STATUS_STYLES = {"done": "green", "failed": "red", "interrupted": "yellow", "lost": "red", "unreadable": "red"}
NOTICES = 5


def show_list(folder: Path, json: bool, screen: Screen) -> int:
    """A row a run, the newest last."""
    runs = list_runs(folder)
    if json:
        print_json([_row(run) for run in runs])
        return 0
    if not runs:
        screen.print(f"no runs in {figures.shown(folder)} yet", soft_wrap=True)
        return 0
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True, overflow="fold")
    table.add_column("status")
    table.add_column("pace")
    for heading in ("workers", "steps", "loss", "samples/s"):
        table.add_column(heading, justify="right")
    for run in runs:
        row = _row(run)
        table.add_row(
            run.name,
            Text(run.status, STATUS_STYLES.get(run.status, "")),
            row["pace"] or "-",
            "-" if row["workers"] is None else str(row["workers"]),
            "-" if row["steps"] is None else f"{row['steps']:,}",
            figures.loss(row["loss"]),
            figures.rate(row["samples_per_s"] or 0.0),
        )
    print_whole(table, screen)
    return 0


def show_run(folder: Path, wanted: str | None, json: bool, screen: Screen) -> int:
    """Everything that the files of one run say."""
    run = find_run(folder, wanted)
    if json:
        info = msgspec.to_builtins(run.info) if run.info is not None else None
        summary = msgspec.to_builtins(run.summary) if run.summary is not None else None
        print_json({**_row(run), "directory": str(run.directory), "info": info, "summary": summary})
        return 0
    if run.info is None and run.summary is None:
        raise UsageError(f"run {run.name!r} cannot be read", why="neither run.json nor summary.json is whole")
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in _details(run):
        table.add_row(key, value)
    screen.print(run.name, style="bold", soft_wrap=True)
    print_whole(table, screen)
    return 0


def _row(run: RunFiles) -> dict[str, Any]:
    source = run.summary or run.info
    return {
        "run": run.name,
        "status": run.status,
        "pace": source.pace if source else None,
        "workers": source.workers if source else None,
        "servers": source.servers if source else None,
        "steps": run.steps,
        "loss": run.loss,
        "samples_per_s": run.summary.samples_per_s if run.summary else None,
    }


def _details(run: RunFiles) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = [("status", run.status)]
    if (summary := run.summary) is not None:
        if summary.reason:
            lines.append(("reason", summary.reason))
        exit_code = f" (exit code {summary.exit_code})" if summary.exit_code else ""
        lines[0] = ("status", f"{run.status}{exit_code}")
    if (info := run.info) is not None:
        lines.append(("command", _command(info.argv)))
        lines.append(("started", info.started or "-"))
        lines.append(("processes", _processes(info.workers, info.servers, info.pace, info.engine)))
        lines.append(("seed", str(info.seed)))
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "-"))
        lines.append(("git", info.git or "-"))
    if run.steps is not None:
        lines.append(("steps", f"{run.steps:,}"))
    lines.append(("loss", figures.loss(run.loss)))
    if summary is not None:
        lines.append(("samples", f"{summary.samples:,} in {figures.duration(summary.seconds)}"))
        lines.append(("speed", f"{figures.rate(summary.samples_per_s)} samples/s"))
        lines.append(("sent", figures.size(summary.bytes_sent)))
    if shares := _shares(run.directory):
        lines.append(("time", shares))
    for notice in last_notices(run.directory, NOTICES):
        lines.append(("event", f"{figures.duration(notice.time_s)}: {notice.text}"))
    for key, part in (("plot", "plots/loss.png"), ("logs", "logs"), ("config", "config.toml")):
        if (run.directory / part).exists():
            lines.append((key, figures.shown(run.directory / part)))
    return lines


def _command(argv: list[str]) -> str:
    """As it can be typed again: the program without the folder it was found in."""
    program = Path(argv[0]).name if argv else "-"
    return shlex.join(["paceline" if program == "__main__.py" else program, *argv[1:]])


def _processes(workers: int, servers: int, pace: str, engine: str) -> str:
    held = f", {figures.plural(servers, 'server')}" if servers else ""
    return f"{figures.plural(workers, 'worker')}{held}, pace {pace}, engine {engine}"


def _shares(directory: Path) -> str:
    """How the workers' time divided, over all rounds."""
    bins = read_series(directory / "metrics.jsonl", most=1)
    parts = {
        "computing": sum(bin.computing_s for bin in bins),
        "exchanging": sum(bin.exchanging_s for bin in bins),
        "waiting": sum(bin.waiting_s for bin in bins),
    }
    whole = sum(parts.values())
    return ", ".join(f"{name} {figures.percent(part / whole)}" for name, part in parts.items()) if whole else ""
