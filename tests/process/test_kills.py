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
        pytest.param("--pace sync --assign lease", marks=pytest.mark.long),
        pytest.param("--pace sync --servers 1", marks=pytest.mark.long),
        "--pace quorum:2",
        pytest.param("--pace bounded:1", marks=pytest.mark.long),
        pytest.param("--pace async", marks=pytest.mark.long),
        pytest.param("--pace async --assign hash", marks=pytest.mark.long),
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


@pytest.mark.parametrize("options", ["--pace sync", pytest.param("--pace async", marks=pytest.mark.long)])
def test_an_exception_in_a_loop_is_no_end_of_its_pass(options: str, runner: Runner) -> None:
    """A worker that has got on for a while raises once: its successor goes on in that pass."""
    raises = """
        if run.rank and epoch == 1 and steps and not (run.directory / "kill-0").exists():
            while time.monotonic() < begun_s + 0.01:  # so that the time is over before the pass is
                pass
            if time.monotonic() > raise_at_s and take_one():
                raise ValueError("once")
        begun_s = time.monotonic()
"""
    script = kills.SCRIPT.replace("        draw_lots()\n", raises.lstrip("\n"))
    script = script.replace("for epoch in", "begun_s = time.monotonic()\nraise_at_s = begun_s + 0.8\nfor epoch in")
    script = script.replace("import threading\n", "import threading\nimport time\n")
    runner.write("counting.py", kills.COUNTING)
    arguments = [str(SAMPLES), str(EPOCHS), "1", "0", "1"]
    ended = runner.run(script, "--workers", "2", *options.split(), args=arguments)
    assert ended.code == 0, ended.err
    assert any(event.get("kind") == "raised" for event in ended.events)
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
