"""Workers are added to jobs that are going on, and leave them: each sample counts once an epoch all the same."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from paceline.engine.launcher.control import ask
from paceline.protocol import messages
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running
from tests.process.standing import at, prepare

SAMPLES, EPOCHS = 800, 7

# Worker 0 stands still in three of its epochs.
SCRIPT = """
import json
import sys

from counting import job, mark
from standing import stand

import paceline

samples, epochs = int(sys.argv[1]), int(sys.argv[2])
run = paceline.init()
counts, optimizer, loader = job(samples, shuffle=True)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(epochs):
    steps = 0
    for (numbers,) in loader:
        mark(counts, numbers)
        if run.rank == 0 and steps == 3 and epoch in (1, 3, 5):
            stand(epoch)
        optimizer.step()
        run.log(steps=steps)
        steps += 1
    assert steps, "a loop must not find an epoch empty"
    print("epoch", epoch, "of", run.num_workers, flush=True)
if run.is_main:
    (run.directory / "counts.json").write_text(json.dumps(counts.detach().tolist()))
"""

ENDLESS = """
import sys
import paceline
import torch

run = paceline.init()
model = torch.nn.Linear(1, 1)
optimizer, loader = run.wrap(torch.optim.SGD(model.parameters(), lr=0.0), [torch.zeros(1, 1)] * 1000)
while True:
    for batch in loader:
        model(batch).sum().backward()
        optimizer.step()
        if run.rank == 0 and run.step == 5:
            print("it goes", flush=True)
"""


def start(runner: Runner, *options: str) -> Running:
    runner.write("counting.py", COUNTING)
    prepare(runner)
    return runner.start_run(SCRIPT, *options, args=[str(SAMPLES), str(EPOCHS)])


@pytest.mark.parametrize(
    "options",
    [
        "--pace sync",
        pytest.param("--pace async --servers 2", marks=pytest.mark.long),
        pytest.param("--pace sync --assign lease", marks=pytest.mark.long),
        pytest.param("--pace sync --servers 1", marks=pytest.mark.long),
        pytest.param("--pace quorum:1", marks=pytest.mark.long),
        pytest.param("--pace bounded:1", marks=pytest.mark.long),
        pytest.param("--pace async", marks=pytest.mark.long),
    ],
)
def test_with_two_workers_then_four_then_one_each_sample_counts_once_an_epoch(options: str, runner: Runner) -> None:
    running = start(runner, "--workers", "2", *options.split())
    with at(runner, running, 1) as events:
        assert runner.paceline("scale", "--workers", "4").code == 0
        events.until("worker 2 trains with the others")
        events.until("worker 3 trains with the others")
    with at(runner, running, 3):
        assert runner.paceline("scale", "--workers", "1").code == 0
    with at(runner, running, 5) as events:
        for worker in (1, 2, 3):
            events.until(f"worker {worker} has left")
    ended = running.end()
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
    told = [(event["kind"], event["rank"]) for event in ended.events if event.get("kind") in ("join", "leave", "died")]
    assert sorted(told[:2]) == [("join", 2), ("join", 3)]
    assert sorted(told[2:5]) == [("leave", 1), ("leave", 2), ("leave", 3)]
    assert told[5:] == [("leave", 0)]
    assert ended.answer["workers"] == 1
    assert "workers = 1\n" in (ended.directory / "config.toml").read_text()
    assert f"epoch {EPOCHS - 1} of 1" in ended.log(0)


def test_wishes_that_cannot_be_are_refused_in_words(runner: Runner) -> None:
    """Also where the socket's path is longer than the kernel takes."""
    folder = Path("a-long-name-" * 12) / "runs"
    (runner.folder / folder.parent).mkdir()
    given = ["--workers", "2", "--min-workers", "2", "--max-workers", "3", "--pace", "quorum:2"]
    running = runner.start_run(ENDLESS, "--run-dir", str(folder), *given)
    running.until("it goes")
    (directory,) = (runner.folder / folder).iterdir()
    mode = os.stat(directory / "control").st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600

    def scale(*options: str) -> tuple[int, str]:
        ended = runner.paceline("scale", "--run-dir", str(folder), *options)
        return ended.code, ended.out + ended.err

    assert scale() == (0, "the run has 2 workers\n")
    code, text = scale("--workers", "4")
    assert (code, text.splitlines()[0]) == (2, "error: workers is 4; the run has room for 3")
    assert "start the run with --max-workers 4" in text
    code, text = scale("--workers", "0")
    assert (code, text.splitlines()[0]) == (2, "error: workers is 0; it must be 1 or more")
    code, text = scale("--workers", "1")
    assert (code, text.splitlines()[0]) == (2, "error: workers is 1; the run was started with --min-workers 2")
    code, text = scale("--servers", "1")
    assert (code, text.splitlines()[0]) == (2, "error: a run that was started without servers stays so")
    ask(directory, messages.Failed("HostError", "server 1 cannot be started", fix="another node"))
    ended = running.end()  # who starts servers elsewhere has said so
    assert (ended.code, ended.error.splitlines()[0]) == (4, "server 1 cannot be started")
    assert "another node" in ended.error
    code, text = scale("--workers", "2")
    assert code == 2
    assert "is not going on" in text
