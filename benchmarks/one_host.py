"""How much of two cores does training with two workers get, next to two processes that share nothing?

    python benchmarks/one_host.py
    python benchmarks/one_host.py --jobs mlp,gpt --rows ddp,sync --rounds 3 --picture share.png --json

For every job, every way of training has its processes started once. They sleep while another way is measured. A round
gives each way a slice of a second or two, one after the other, so that what disturbs the machine for a while falls
on all alike, and every figure is a ratio of two slices of one round. Reported are the ratios' median, lower
quartile and range over the rounds. The ceiling is two processes that share nothing, which is all that two cores can
do with that script; it steps AdamW as torch does unless told, and a way that steps cheaper can pass it.

Every process has one thread; all of them together have two cores. Rates count both workers' samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.jobs import JOBS
from benchmarks.rivals import WAYS
from benchmarks.teams import Team, TeamError

_CORES = 2
_CEILING, _RIVALS = "ceiling", ("ddp", "ddp_fused")
_MEASURED = (
    "ceiling",
    "ddp",
    "ddp_fused",
    "ddp_best",
    "rpc",
    "ray",
    "sync",
    "sync_server",
    "bounded",
    "async",
    "async_server",
)
_QUIET = 0.05  # with more than this share of the cores used by others, the figures come with a warning
_COLUMNS = 3  # of panels in a picture
_INK, _GREY, _OURS = "#22272e", "#7a828c", "#1f5fa8"


@dataclass(frozen=True)
class Spread:
    """What was measured in each round, in one number, its lower quartile, and its range."""

    median: float
    lower_quartile: float
    min: float
    max: float


@dataclass(frozen=True)
class Row:
    """One way on one job. ``ratios`` are to the ceiling's slice, and each rival's, of the same round.

    Memory is proportional set size without pages of files, of the workers and of all the way's processes.
    """

    samples_per_s: list[float]
    ratios: dict[str, Spread]
    workers_mb: float
    all_mb: float


@dataclass(frozen=True)
class Table:
    """One job. ``others`` is the share of the cores that other programs took while it was measured."""

    parameters_mb: float
    others: float
    rows: dict[str, Row]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    cores = cores_apart()
    if len(cores) < _CORES:
        print(f"error: {len(cores)} core is available; the benchmark needs {_CORES}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    os.sched_setaffinity(0, cores)  # what is started from here on inherits it
    machine = {
        "cpu": _cpu(),
        "cores": cores,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results: dict[str, Table] = {}
    try:
        for job in options.jobs:
            rows = [row for row in options.rows if JOBS[job].can_fuse or not WAYS[row].fused]
            table = results[job] = _measure(job, rows, options.rounds, options.seconds, cores)
            print(f"\n{job}: {JOBS[job].told}; {table.parameters_mb:.1f} MB of parameters")
            print("\n".join(_lines(table.rows)), flush=True)
            if table.others > _QUIET:
                print(f"not to be trusted: other programs took {table.others:.0%} of the cores", flush=True)
    except TeamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.picture:
        _draw(results, options.picture)
        print(f"\npicture {options.picture}")
    if options.json:
        print(json.dumps({"machine": machine, "jobs": {job: asdict(table) for job, table in results.items()}}))
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=names(JOBS), default=list(JOBS), help=f"of {','.join(JOBS)}")
    parser.add_argument("--rows", type=names(WAYS), default=list(_MEASURED), help=f"ways, of {','.join(WAYS)}")
    parser.add_argument("--rounds", type=positive(int), default=7, help="slices of each way (default 7)")
    parser.add_argument("--seconds", type=positive(float), default=1.5, help="of a slice (default 1.5)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the shares of the ceiling")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object in the last line")
    options = parser.parse_args(argv)
    # The ceiling is measured whether asked for or not: nothing means much without it.
    options.rows = [way for way in WAYS if way in options.rows or way == _CEILING]
    for way in [way for way in options.rows if WAYS[way].missing()]:
        print(f"{way} is left out: pip install {WAYS[way].missing()}", file=sys.stderr)
        options.rows.remove(way)
    return options


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What reads an option that is some of the known names, with commas between them."""

    def read(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        strangers = [name for name in chosen if name not in known]
        if strangers:
            raise argparse.ArgumentTypeError(f"{strangers[0]!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(chosen))

    return read


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """What reads an option that is a number above 0."""

    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < 10_000:
            raise argparse.ArgumentTypeError(f"{text} must be above 0 and below 10,000")
        return value

    read.__name__ = kind.__name__  # what argparse calls it when kind() refuses
    return read


def _measure(job: str, ways: list[str], rounds: int, seconds: float, cores: list[int]) -> Table:
    """Raises TeamError."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="one-host-") as directory, ExitStack() as stack:
        _progress(f"{job}: starting {len(ways)} ways")
        teams = [stack.enter_context(Team(WAYS[way], job, Path(directory))) for way in ways]
        for team in teams:
            team.ready()
        for team in teams:
            _progress(f"{job}: warming up {team.way.name}")
            team.warm_up(seconds)
        begun = (time.monotonic(), _busy_s(cores), sum(team.cpu_s() for team in teams))
        for number in range(rounds):
            _progress(f"{job}: round {number + 1} of {rounds}")
            # Each round begins with another way, so that none is always behind the same one.
            first = number % len(teams)
            for team in teams[first:] + teams[:first]:
                rates[team.way.name].append(team.slice(seconds) * JOBS[job].samples)
        ended = (time.monotonic(), _busy_s(cores), sum(team.cpu_s() for team in teams))
        took_s, busy_s, ours_s = (after - before for before, after in zip(begun, ended, strict=True))
        _progress("")
        bases = [way for way in (_CEILING, *_RIVALS) if way in rates]
        rows = {}
        for team in teams:
            own = rates[team.way.name]
            to_bases = {base: spread(ratios(own, rates[base])) for base in bases}
            rows[team.way.name] = Row([round(rate, 2) for rate in own], to_bases, *team.memory_mb())
        others = max(round((busy_s - ours_s) / (took_s * len(cores)), 4), 0.0)
        return Table(teams[0].parameter_bytes / 1e6, others, rows)


def spread(values: list[float]) -> Spread:
    lower = quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]
    return Spread(*(round(number, 4) for number in (median(values), lower, min(values), max(values))))


def _lines(rows: dict[str, Row]) -> list[str]:
    lines = [
        f"{'':47}{'samples/s':>11}{'% of ceiling':>15}{'':14}{'x ddp':>14}{'x ddp_fused':>14}{'memory, MB':>14}",
        f"{'':47}{'median':>11}{'median':>9}{'lower':>6}{'range':>14}"
        f"{'median':>8}{'lower':>6}{'median':>8}{'lower':>6}{'workers':>8}{'all':>6}",
    ]
    for way, row in rows.items():
        share = row.ratios[_CEILING]
        line = f"{way:14}{WAYS[way].told:33}{median(row.samples_per_s):11,.0f}"
        line += f"{share.median:9.1%}{share.lower_quartile:6.0%}{f'{share.min:.0%}..{share.max:.0%}':>14}"
        for rival in _RIVALS:
            ratio = row.ratios.get(rival)
            line += f"{ratio.median:8.2f}{ratio.lower_quartile:6.2f}" if ratio else f"{'-':>8}{'-':>6}"
        lines.append(f"{line}{row.workers_mb:8,.0f}{row.all_mb:6,.0f}")
    if {"sync", "sync_bare"} <= rows.keys():
        kept = sorted(ratios(rows["sync"].samples_per_s, rows["sync_bare"].samples_per_s))
        low, middle, high = quantiles(kept, n=4, method="inclusive") if len(kept) > 1 else kept * 3
        lines.append(f"saving what a step overwrites costs {1 - middle:.1%} of it ({1 - high:.1%} to {1 - low:.1%})")
    return lines


def ratios(rates: list[float], bases: list[float]) -> list[float]:
    """The ratios within each round."""
    return [rate / base for rate, base in zip(rates, bases, strict=True)]


def _draw(results: dict[str, Table], path: Path) -> None:
    """A panel for each job: each way's median share of the ceiling, and a line from its lowest to its highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways = [way for way in WAYS if way != _CEILING and any(way in table.rows for table in results.values())]
    columns = min(len(results), _COLUMNS)
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(1.5 + 3.2 * columns, (0.8 + 0.26 * len(ways)) * lines), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    for axes, (job, table) in zip(panels, results.items(), strict=False):
        rows = table.rows
        for place, way in enumerate(ways):
            if way not in rows:
                continue
            share, color = rows[way].ratios[_CEILING], _OURS if WAYS[way].kind == "paceline" else _GREY
            axes.plot([100 * share.min, 100 * share.max], [place, place], color=color, linewidth=1.5)
            axes.plot(100 * share.median, place, "o", color=color, markersize=7)
            at = (100 * share.median, place)
            axes.annotate(
                f"{share.median:.0%}", at, (0, 7), textcoords="offset points", ha="center", fontsize=8, color=_INK
            )
        axes.axvline(100, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_title(job, loc="left", fontsize=10, color=_INK)
        axes.set_xlim(0, 1.1 * max(100.0, *(100 * rows[way].ratios[_CEILING].max for way in rows)))
        axes.set_yticks(range(len(ways)), labels=ways)
        axes.set_ylim(len(ways) - 0.5, -0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_GREY, labelcolor=_INK, labelsize=9)
    figure.supxlabel("samples a second, % of two processes that share nothing", fontsize=9, color=_INK)
    figure.savefig(path)


def cores_apart() -> list[int]:
    """The first cores this process may run on; the hardware threads of one core count as one if there are enough."""
    allowed = sorted(os.sched_getaffinity(0))
    first = {_siblings(cpu): cpu for cpu in reversed(allowed)}
    apart = sorted(first.values())
    return (apart if len(apart) >= _CORES else allowed)[:_CORES]


def _busy_s(cores: list[int]) -> float:
    """Seconds these cores have worked so far, for anyone: user, nice, system, interrupts, and stolen by a host."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _idle, _iowait, *rest = map(int, numbers[:8])
            ticks += user + nice + system + sum(rest)
    return ticks / os.sysconf("SC_CLK_TCK")


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
