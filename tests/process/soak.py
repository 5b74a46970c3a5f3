"""Kill processes of real jobs for long: ``python -m tests.process.soak KILLS [--pace PACE]``, as ``make soak`` does.

At every pace jobs run one after the other, each with several kills at random moments, until so many processes have died
there. Every sample must have counted exactly once an epoch in every job. The last line of each pace is its sum.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.process import kills
from tests.process.runner import Runner

WAYS = (
    "--pace sync",
    "--pace sync --servers 2",
    "--pace sync --assign lease",
    "--pace quorum:2",
    "--pace bounded:1",
    "--pace async",
    "--pace async --servers 2",
)
SAMPLES, EPOCHS, KILLS_A_JOB = 2000, 4, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--pace", help="only ways that begin so")
    given = parser.parse_args()
    bad = 0
    for way in WAYS:
        if given.pace is not None and not way.startswith(f"--pace {given.pace}"):
            continue
        died = jobs = wrong = 0
        begun_s = time.monotonic()
        while died < given.kills:
            jobs += 1
            found, deaths = one(way, seed=jobs)
            died += deaths
            if found:
                wrong += 1
                print(f"  {way}: job {jobs}: {found}", flush=True)
        bad += wrong
        took_s = time.monotonic() - begun_s
        print(f"{way}: {died} processes killed in {jobs} jobs, {wrong} wrong, {took_s:.0f} s", flush=True)
    return 1 if bad else 0


def one(way: str, seed: int) -> tuple[str, int]:
    """What is wrong with a job, if anything; how many of its processes died."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        try:
            given = ["--workers", "3", *way.split()]
            ended = kills.run(runner, *given, samples=SAMPLES, epochs=EPOCHS, kills=KILLS_A_JOB, chance=0.02, seed=seed)
            deaths = sum(event.get("kind") == "died" for event in ended.events)
            if ended.code:
                return f"exit {ended.code}: {ended.err[-2000:]}", deaths
            counts = json.loads((ended.directory / "counts.json").read_text())
            return "" if counts == [EPOCHS] * SAMPLES else f"{sum(c != EPOCHS for c in counts)} counts are off", deaths
        except AssertionError as error:
            return str(error)[-2000:], 1
        finally:
            runner.close()


if __name__ == "__main__":
    sys.exit(main())
