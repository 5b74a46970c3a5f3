"""``python -m tests.simulation N [--seed FIRST] [--world rounds|log]`` runs N schedules of each world; with
``--trace`` and N = 1 it prints the turns of one."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback

from tests.simulation.plans import WORLDS
from tests.simulation.world import World


def replay(world: str, seed: int) -> str:
    return f"python -m tests.simulation 1 --seed {seed} --world {world} --trace"


def run(world: str, seed: int) -> World:
    """One schedule. Raises AssertionError, with a note on how to replay it."""
    one = World(seed, world)
    try:
        one.run()
    except BaseException as error:
        error.add_note(f"seed {seed} of world {world}; replay: {replay(world, seed)}")
        raise
    return one


def try_one(which: tuple[str, int]) -> tuple[str, int, str] | None:
    world, seed = which
    try:
        run(world, seed)
    except Exception as error:  # noqa: BLE001  told to who asked
        return world, seed, "".join(traceback.format_exception(error)[-12:])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("schedules", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=WORLDS)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--keep-going", action="store_true")
    asked = parser.parse_args()
    worlds = [asked.world] if asked.world else list(WORLDS)
    seeds = range(asked.seed, asked.seed + asked.schedules)
    if asked.trace:
        for seed in seeds:
            for world in worlds:
                World(seed, world, trace=print).run()
        return 0
    begun = time.monotonic()
    failures = 0
    with multiprocessing.Pool(asked.processes) as pool:
        jobs = ((worlds[seed % len(worlds)], seed) for seed in seeds)
        for failure in pool.imap_unordered(try_one, jobs, chunksize=20):
            if failure is not None:
                world, seed, told = failure
                failures += 1
                print(f"seed {seed} of world {world} fails:\n{told}")
                print(f"replay: {replay(world, seed)}", flush=True)
                if not asked.keep_going:
                    pool.terminate()
                    return 1
    print(f"{asked.schedules} schedules in {time.monotonic() - begun:.0f} s, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
