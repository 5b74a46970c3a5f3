"""Several workers of a job are killed at random moments: training goes on, and each sample counts once an epoch."""

from __future__ import annotations

import json

import pytest

from tests.process import kills
from tests.process.runner import Runner, await_death, open_pids

SAMPLES, EPOCHS, KILLS = 1200, 3, 6


@pytest.mark.parametrize(
    "options",
    [
        "--pace sync",
        "--pace sync --assign lease",
        "--pace sync --servers 1",
        "--pace quorum:2",
        "--pace bounded:1",
        "--pace async",
        "--pace async --assign hash",
        "--pace async --servers 2",
    ],
)
def test_whoever_is_killed_each_sample_counts_once_an_epoch(options: str, runner: Runner) -> None:
    given = ["--workers", "3", *options.split()]
    ended = kills.run(runner, *given, samples=SAMPLES, epochs=EPOCHS, kills=KILLS, chance=0.03, seed=1)
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
    died = [event for event in ended.events if event.get("kind") == "died"]
    assert died
    assert all(event["text"].endswith("was killed by SIGKILL; another takes its place") for event in died)
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))
