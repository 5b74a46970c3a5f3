"""A worker that dies within an epoch, and is not replaced: the others train on what is left of its part."""

from __future__ import annotations

import json
import signal

import pytest

from tests.process.kills import COUNTING
from tests.process.runner import Ended, Runner, await_death, open_pids
from tests.process.standing import at, prepare

# Worker 3 dies in the second epoch, after a few steps. When it has trained on one batch of what is left of that one's
# part, and is at another, worker 2 dies, or worker 0 stands, if they are to. Worker 0 writes how often each sample was
# counted.
SCRIPT = """
import json
import os
import signal
import sys

from counting import job, mark
from standing import stand

import paceline
from paceline.data.assign import owners
from paceline.engine.context import current

samples, epochs, second = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run = paceline.init()
counts, optimizer, loader = job(samples, shuffle=True)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(epochs):
    steps = inherited = 0
    for (numbers,) in loader:
        whose = owners(current.job.assign, numbers.numpy(), samples, 4, current.job.seed, epoch)
        if epoch == 1 and run.rank == 3 and steps == 4 and not (run.directory / "died").exists():
            (run.directory / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if epoch == 1 and run.rank != 3 and 3 in whose:
            inherited += 1
            if second == "dies" and run.rank == 2 and inherited == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if second == "stands" and run.is_main and inherited == 2:
                stand(1)
        mark(counts, numbers)
        optimizer.step()
        steps += 1
    print(f"epoch {epoch}: {steps} steps")
if run.is_main:
    (run.directory / "counts.json").write_text(json.dumps(counts.detach().tolist()))
"""
SAMPLES, EPOCHS = 600, 3
GIVEN = ["--workers", "4", "--restarts", "0", "--min-workers", "1"]


def check(ended: Ended, *lost: int) -> None:
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
    died = [event for event in ended.events if event.get("kind") == "died"]
    assert [event["rank"] for event in died] == list(lost)
    assert all("without it" in event["text"] for event in died)
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


@pytest.mark.parametrize("second", [pytest.param("lives", marks=pytest.mark.long), "dies"])
@pytest.mark.parametrize(
    "options",
    [
        "--pace sync --assign hash",
        pytest.param("--pace async --assign random", marks=pytest.mark.long),  # below, another run of such goes on
        pytest.param("--pace sync --assign random", marks=pytest.mark.long),
        pytest.param("--pace async --assign hash --servers 1", marks=pytest.mark.long),
        pytest.param("--pace sync --assign hash --servers 1", marks=pytest.mark.long),
        pytest.param("--pace quorum:2 --assign hash", marks=pytest.mark.long),
        pytest.param("--pace bounded:1 --assign random", marks=pytest.mark.long),
    ],
)
def test_without_a_worker_that_is_given_up_each_sample_counts_once(options: str, second: str, runner: Runner) -> None:
    """Also where another is given up within what was left of the first one's part."""
    runner.write("counting.py", COUNTING)
    prepare(runner, [])
    ended = runner.run(SCRIPT, *GIVEN, *options.split(), args=[str(SAMPLES), str(EPOCHS), second])
    check(ended, 3, *([2] if second == "dies" else []))
    assert f"epoch {EPOCHS - 1}" in ended.log(0)


@pytest.mark.parametrize(
    ("options", "then"),
    [
        pytest.param("--pace sync --assign hash", "--workers 3", marks=pytest.mark.long),
        ("--pace async --assign random", ""),
        pytest.param("--pace sync --assign hash", "", marks=pytest.mark.long),
        pytest.param("--pace async --assign random", "--workers 3", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_from_within_what_was_left(options: str, then: str, runner: Runner) -> None:
    """As many workers as there were go on with their parts of it; to others it is dealt anew."""
    runner.write("counting.py", COUNTING)
    prepare(runner, [1])
    running = runner.start_run(SCRIPT, *GIVEN, *options.split(), args=[str(SAMPLES), str(EPOCHS), "stands"])
    with at(runner, running, 1) as events:
        running.signal(signal.SIGINT)
        events.until("asked to stop: ")
    first = running.end()
    assert first.code == 130, first.err
    ended = runner.paceline("resume", "--json", str(first.directory), *then.split())
    check(ended, 3)
