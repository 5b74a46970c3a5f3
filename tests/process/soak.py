"""Kill processes of real jobs for long: ``python -m tests.process.soak KILLS [--pace PACE]``, as ``make soak`` does.

At every pace jobs run one after the other, each with several kills at random moments, until so many workers have died
there, so many launchers, and so many servers where there are any. Every sample must have counted exactly once an epoch
in every job. Where there are servers, they come and leave meanwhile. The last line of each pace is its sum.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.process import kills
from tests.process.runner import Runner

WAYS = (
    "--pace sync",
    "--pace sync --servers 2 --max-servers 4",
    "--pace sync --assign lease",
    "--pace quorum:2",
    "--pace bounded:1",
    "--pace async",
    "--pace bounded:1 --servers 1 --max-servers 4",
    "--pace async --servers 2 --max-servers 4",
)
SAMPLES, EPOCHS, KILLS_A_JOB = 2000, 4, 8
ENOUGH = 10  # so many wrong jobs of one way need no more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--pace", help="only ways that begin so")
    given = parser.parse_args()
    bad = 0
    for way in WAYS:
        if given.pace is not None and not way.startswith(f"--pace {given.pace}"):
            continue
        died: Counter[str] = Counter()
        roles = ("worker", "launcher", "server") if "--servers" in way else ("worker", "launcher")
        jobs = wrong = 0
        begun_s = time.monotonic()
        while any(died[role] < given.kills for role in roles) and wrong < ENOUGH:
            jobs += 1
            found, deaths = one(way, seed=jobs)
            died += deaths
            if found:
                wrong += 1
                print(f"  {way}: job {jobs}: {found}", flush=True)
        bad += wrong
        took_s = time.monotonic() - begun_s
        killed = ", ".join(f"{died[role]} {role}s" for role in roles)
        print(f"{way}: {killed} killed in {jobs} jobs, {wrong} wrong, {took_s:.0f} s", flush=True)
    return 1 if bad else 0


def one(way: str, seed: int) -> tuple[str, Counter[str]]:
    """What is wrong with a job, if anything; how many of its processes died, by role."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        try:
            given = ["--workers", "3", *way.split()]
            ended = kills.run(
                runner,
                *given,
                samples=SAMPLES,
                epochs=EPOCHS,
                kills=KILLS_A_JOB,
                chance=0.02,
                seed=seed,
                launchers=True,
                wishes="--servers" in way,
            )
            deaths = Counter(str(event["role"]) for event in ended.events if event.get("kind") == "died")
            if ended.code:
                return f"exit {ended.code}: {ended.err[-2000:]}", deaths
            counts = json.loads((ended.directory / "counts.json").read_text())
            return "" if counts == [EPOCHS] * SAMPLES else f"{sum(c != EPOCHS for c in counts)} counts are off", deaths
        except AssertionError as error:
            return str(error)[-2000:], Counter()
        finally:
            runner.close()


if __name__ == "__main__":
    sys.exit(main())
