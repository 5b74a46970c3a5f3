"""Scripts that stand still in some epochs, each time until the test lets them go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.process.runner import Runner, Running

# ``stand`` says where it stands and reads from a pipe, once an epoch, whatever becomes of its process.
STANDING = """
import os


def stand(epoch):
    try:
        os.close(os.open(f"stood-{epoch}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(f"stands in epoch {epoch}.", flush=True)
    with open(f"epoch-{epoch}") as pipe:
        pipe.read()
"""
STANDS_IN = (1, 3, 5)


def prepare(runner: Runner) -> None:
    """For scripts that import ``stand`` from ``standing``, and call it in the epochs ``STANDS_IN``."""
    runner.write("standing.py", STANDING)
    for epoch in STANDS_IN:
        os.mkfifo(runner.folder / f"epoch-{epoch}")


@contextmanager
def at(runner: Runner, running: Running, epoch: int) -> Iterator[Running]:
    """While it stands in this epoch: the run's events, as they come."""
    running.until(f"stands in epoch {epoch}.")
    (told,) = (runner.folder / "runs").glob("*/events.jsonl")
    with runner.follow(told) as events:
        yield events
    runner.write(f"epoch-{epoch}", "")
