"""A run that goes on from a checkpoint comes to what it would have come to."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from tests.process import standing
from tests.process.runner import Ended, Runner, Running
from tests.process.training import numbers


def is_resumed_to_the_bit(runner: Runner, script: str, start: Callable[..., list[Running]], *, every: int = 5) -> None:
    """From the second of the checkpoints made every so many steps. ``start(name, **variables)``: workers, by rank."""
    standing.prepare(runner, [])
    runner.write("train.py", script)
    whole = _ended(start("train.py", PACELINE_CHECKPOINT_EVERY=str(every), PACELINE_KEEP="9"))
    expected = numbers(whole)
    (whole.directory / "numbers.json").unlink()
    for late in sorted((whole.directory / "checkpoints").iterdir())[2:]:
        shutil.rmtree(late)
    # By its name: ``last`` begins a new run where the newest is done.
    resumed = _ended(start("train.py", PACELINE_RESUME=whole.directory.name, PACELINE_JSON="1"))
    assert f"goes on behind step {2 * every}" in resumed.err
    assert numbers(resumed) == expected


def _ended(all_: list[Running]) -> Ended:
    """Rank 0's, when all have ended well."""
    *_, first = [running.end() for running in reversed(all_)]
    assert first.code == 0, first.err
    return first
