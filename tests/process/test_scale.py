"""Workers are added to jobs that are going on, and leave them: each sample counts once an epoch all the same."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.process.kills import COUNTING
from tests.process.runner import Runner

SAMPLES, EPOCHS = 800, 7

# Worker 0 wishes for others from within its own loop, and waits in it until they have come, or left.
SCRIPT = """
import json
import os
import subprocess
import sys
import time

import torch
from counting import Counting
from torch.utils.data import DataLoader, TensorDataset

import paceline

samples, epochs = int(sys.argv[1]), int(sys.argv[2])


def scale(workers):
    command = [sys.executable, "-m", "paceline", "scale", str(run.directory), "--workers", str(workers)]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="", flush=True)


def seen(kind, times):
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    return sum(json.loads(line).get("kind") == kind for line in lines) >= times


run = paceline.init()
counts = torch.nn.Parameter(torch.zeros(samples, dtype=torch.float64))
optimizer = Counting([counts])
loader = DataLoader(TensorDataset(torch.arange(samples)), batch_size=4, shuffle=True)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(epochs):
    steps = 0
    for (numbers,) in loader:
        counts.grad = torch.zeros_like(counts)
        counts.grad[numbers] = 1.0
        if run.rank == 0 and steps == 3 and epoch == 1:
            scale(4)
            while not seen("join", 2):
                time.sleep(0.01)
        if run.rank == 0 and steps == 3 and epoch == 3:
            scale(1)
        if run.rank == 0 and steps == 3 and epoch == 5:
            while not seen("leave", 3):
                time.sleep(0.01)
        optimizer.step()
        run.log(loss=float(steps))
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


@pytest.mark.parametrize(
    "options",
    [
        "--pace sync",
        "--pace async --servers 2",
        pytest.param("--pace sync --assign lease", marks=pytest.mark.long),
        pytest.param("--pace sync --servers 1", marks=pytest.mark.long),
        pytest.param("--pace quorum:1", marks=pytest.mark.long),
        pytest.param("--pace bounded:1", marks=pytest.mark.long),
        pytest.param("--pace async", marks=pytest.mark.long),
    ],
)
def test_with_two_workers_then_four_then_one_each_sample_counts_once_an_epoch(options: str, runner: Runner) -> None:
    runner.write("counting.py", COUNTING)
    ended = runner.run(SCRIPT, "--workers", "2", *options.split(), args=[str(SAMPLES), str(EPOCHS)])
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
    running.close()
    code, text = scale("--workers", "2")
    assert code == 2
    assert "is not going on" in text
