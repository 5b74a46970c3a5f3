"""From 1 worker to 8 on two cores: what does a machine that is asked for too much give?

    python -m benchmarks.scale
    python -m benchmarks.scale --jobs mlp --ways ceiling,ddp,sync --workers 1,2,3,4,6,8 --picture scale.png

Rates are all workers' samples a second, each way's slices interleaved with the others'; the figures are ratios to the
same way's 2 workers in the same round, which have a core each. Flat is right: more workers than cores cannot give more,
and must not give much less. Every process has one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.jobs import JOBS
from benchmarks.one_host import cores_apart, names, positive
from benchmarks.rivals import WAYS, find_way
from benchmarks.teams import Team, TeamError

_BASE = 2
_MEASURED = ("ceiling", "ddp", "sync", "async")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=names(JOBS), default=["mlp"], help=f"of {','.join(JOBS)} (default mlp)")
    parser.add_argument("--ways", type=names(WAYS), default=list(_MEASURED), help=f"of {','.join(WAYS)}")
    parser.add_argument("--workers", type=_counts, default=[1, 2, 3, 4, 6, 8], help="how many; 2 are always measured")
    parser.add_argument("--rounds", type=positive(int), default=5, help="slices of each (default 5)")
    parser.add_argument("--seconds", type=positive(float), default=0.8, help="of a slice (default 0.8)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves")
    options = parser.parse_args(argv)
    for job, way in product(options.jobs, options.ways):
        if WAYS[way].fused and not JOBS[job].can_fuse:
            parser.error(f"argument --ways: {way} steps AdamW, the job {job} has SGD: leave one of them out")
    for way in options.ways:
        if WAYS[way].missing():
            parser.error(f"argument --ways: {way} needs: pip install {WAYS[way].missing()}")
    os.sched_setaffinity(0, cores_apart())
    counts = sorted({_BASE, *options.workers})
    try:
        curves = {
            job: {way: _curve(job, way, counts, options.rounds, options.seconds) for way in options.ways}
            for job in options.jobs
        }
    except TeamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for job, ways in curves.items():
        print(f"\n{job}: {JOBS[job].told}; % of the same way's {_BASE} workers: median (lowest to highest)")
        print(f"{'workers':10}" + "".join(f"{count:>22}" for count in counts))
        for way, curve in ways.items():
            cells = [f"{median(r):.0%} ({min(r):.0%} to {max(r):.0%})" for r in curve]
            print(f"{way:10}" + "".join(f"{cell:>22}" for cell in cells))
    if options.picture:
        _draw(curves, counts, options.picture)
    return 0


def _counts(text: str) -> list[int]:
    try:
        return [int(positive(int)(count)) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them") from None


def _curve(job: str, way: str, counts: list[int], rounds: int, seconds: float) -> list[list[float]]:
    """For each number of workers its ratios to 2 workers, one a round. Raises TeamError."""
    rates: list[list[float]] = [[] for _ in counts]
    with tempfile.TemporaryDirectory(prefix="scale-") as directory, ExitStack() as stack:
        teams = [stack.enter_context(Team(find_way(f"{way}@{count}"), job, Path(directory))) for count in counts]
        for team in teams:
            team.ready()
            team.warm_up(seconds)
        for number in range(rounds):
            first = number % len(teams)
            for place in [*range(first, len(teams)), *range(first)]:
                rates[place].append(teams[place].slice(seconds))
    base = rates[counts.index(_BASE)]
    return [[rate / of for rate, of in zip(row, base, strict=True)] for row in rates]


def _draw(curves: dict[str, dict[str, list[list[float]]]], counts: list[int], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(curves), 3.4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (job, ways) in zip(panels, curves.items(), strict=True):
        for way, curve in ways.items():
            axes.plot(counts, [100 * median(r) for r in curve], marker="o", markersize=4, label=way)
            axes.fill_between(counts, [100 * min(r) for r in curve], [100 * max(r) for r in curve], alpha=0.15)
        axes.set_title(job, loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("workers on two cores", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"samples a second, % of {_BASE} workers", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
