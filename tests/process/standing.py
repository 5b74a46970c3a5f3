"""Scripts that stand still at some places, each time until the test lets them go on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.process.runner import Runner, Running

# ``stand`` says where it stands and reads a byte from a pipe, once a place, whatever becomes of its process.
STANDING = """
import os


def stand(place):
    try:
        os.close(os.open(f"stood-{place}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(f"stands at {place}.", flush=True)
    with open(f"place-{place}", "rb", buffering=0) as pipe:
        pipe.read(1)
"""
STANDS_IN = (1, 3, 5)


def prepare(runner: Runner, places: Sequence[int] = STANDS_IN) -> None:
    """For scripts that import ``stand`` from ``standing``, and call it at these places (epochs, steps)."""
    runner.write("standing.py", STANDING)
    for place in places:
        os.mkfifo(runner.folder / f"place-{place}")
        runner.keep(f"place-{place}")


@contextmanager
def at(runner: Runner, running: Running, place: int) -> Iterator[Running]:
    """While it stands there: the run's events, as they come."""
    running.until(f"stands at {place}.")
    newest = max((runner.folder / "runs").iterdir())
    with runner.follow(newest / "events.jsonl") as events:
        yield events
    runner.kept[f"place-{place}"].write(b"!")
