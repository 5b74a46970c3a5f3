"""`paceline run --pace ...` with real processes: each pace trains, and its files say what was done.

That a pace does what it promises is shown in tests/unit/engine; here it is held against the files of a run.
"""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.process.runner import Ended, Runner

SAMPLES, BATCH, PASSES, WORKERS = 96, 4, 4, 2

# Where nobody waits, worker 0's first gradient is made to be old: it waits for worker 1's third step.
TRAIN = f"""
import json
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

torch.manual_seed(0)
x = torch.randn({SAMPLES}, 7)
y = torch.tanh(x @ torch.randn(7, 3))
model = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, 3))
run = paceline.init()
model, optimizer, loader = run.wrap(
    model, torch.optim.SGD(model.parameters(), lr=0.05), DataLoader(TensorDataset(x, y), {BATCH})
)
apart = str(run.pace) in ("async", "quorum:1")
gate = run.directory / "gate"
if apart and run.is_main:
    os.mkfifo(gate)
run.wrap(nn.Linear(1, 1))  # all have come here
mine = 0
for _ in range({PASSES}):
    for inputs, targets in loader:
        loss = (model(inputs) - targets).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        if apart and mine == 0 and run.rank == 0:
            gate.read_text()
        optimizer.step()
        run.log(loss=loss)
        mine += 1
        if apart and mine == 3 and run.rank == 1:
            gate.write_text("go on")
print("mine", mine)
print("model", json.dumps([p.flatten().tolist() for p in model.parameters()]))
"""


def said(text: str, word: str) -> Any:
    (line,) = (line for line in text.splitlines() if line.startswith(f"{word} "))
    return json.loads(line.partition(" ")[2])


def falls(ended: Ended) -> None:
    """Fails unless the loss of the last pass is well below that of the first."""
    losses = [metric["loss"] for metric in ended.metrics]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.8 * sum(losses[:quarter]), losses


BATCHES = SAMPLES // BATCH * PASSES
# (pace, servers) -> lines of metrics: rounds, groups of as many pushes as there are workers, or rounds of local steps
LINES = {
    ("quorum:2", 0): BATCHES // WORKERS,
    ("bounded:1", 1): BATCHES // WORKERS,
    ("async", 0): BATCHES // WORKERS,
    ("async", 1): BATCHES // WORKERS,
    ("local:5", 1): PASSES * 3,  # 5, 5 and the 2 that are left in a pass of 12
    ("local:4:nesterov", 0): PASSES * 3,
}


MORE = {*LINES} - {("async", 1)}  # `make long` runs these too


@pytest.mark.parametrize(
    ("pace", "servers"), [pytest.param(*line, marks=pytest.mark.long) if line in MORE else line for line in LINES]
)
def test_a_pace_trains_on_all_samples_and_tells_of_them(pace: str, servers: int, runner: Runner) -> None:
    options = ["--pace", pace, "--workers", str(WORKERS), "--servers", str(servers), "--assign", "round_robin"]
    ended = runner.run(TRAIN, *options)
    assert ended.code == 0, ended.err
    assert (ended.answer["status"], ended.answer["pace"], ended.info["pace"]) == ("done", pace, pace)
    assert said(ended.out, "mine") == said(ended.log(1), "mine") == BATCHES // WORKERS
    assert said(ended.out, "model") == said(ended.log(1), "model")

    assert ended.answer["samples"] == SAMPLES * PASSES
    assert ended.answer["epochs"] == PASSES
    assert sum(metric["samples"] for metric in ended.metrics) == SAMPLES * PASSES
    assert len(ended.metrics) == LINES[pace, servers]
    assert ended.metrics[-1]["step"] == BATCHES // WORKERS
    steps = [metric["step"] for metric in ended.metrics]
    assert steps == sorted(set(steps))
    assert all(metric["dropped"] == 0 for metric in ended.metrics)
    staleness = [metric["staleness"] for metric in ended.metrics]
    if pace.startswith(("bounded", "async")):
        assert max(staleness) > 0
    else:
        assert staleness == [0] * len(staleness)
    falls(ended)


def test_dropped_pushes_are_told_and_their_samples_come_again(runner: Runner) -> None:
    options = ["--pace", "quorum:1", "--workers", "2", "--servers", "1", "--assign", "round_robin"]
    ended = runner.run(TRAIN, *options)
    assert ended.code == 0, ended.err
    dropped = sum(metric["dropped"] for metric in ended.metrics)
    assert dropped >= 1
    assert ended.answer["samples"] == sum(metric["samples"] for metric in ended.metrics) == SAMPLES * PASSES
    assert ended.answer["dropped"] == dropped
    assert all(metric["staleness"] == 0 for metric in ended.metrics)
    falls(ended)


@pytest.mark.long  # tests/unit/engine/test_paces_end.py has it at every pace
@pytest.mark.parametrize(("pace", "servers", "more"), [("async:3", 1, 2), ("local:4", 0, 0)])
def test_steps_are_as_many_samples_at_every_pace(pace: str, servers: int, more: int, runner: Runner) -> None:
    """Nine steps of two workers are 18 batches. With three local steps in a push the last may be of up to two more."""
    options = ["--pace", pace, "--workers", "2", "--servers", str(servers), "--steps", "9", "--assign", "round_robin"]
    ended = runner.run(TRAIN, *options)
    assert ended.code == 0, ended.err
    assert ended.answer["reason"] == "9 steps done"
    assert 18 * BATCH <= ended.answer["samples"] <= (18 + more) * BATCH
    assert said(ended.out, "model") == said(ended.log(1), "model")
    if not more:
        assert ended.metrics[-1]["step"] == 9


ENDLESS = """
import os
import signal
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline

run = paceline.init()
weight = torch.nn.Parameter(torch.zeros(6))
optimizer, loader = run.wrap(torch.optim.SGD([weight], lr=0.1), DataLoader(TensorDataset(torch.randn(52, 6))))
steps = 0
while True:
    for number, (x,) in enumerate(loader):
        optimizer.zero_grad()
        (weight * x).sum().backward()
        optimizer.step()
        steps += 1
        if run.is_main:
            print("own step", steps)
        elif "dies" in sys.argv and number == 5:
            run.worker.context.lock.__enter__()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_killed_while_it_holds_the_lock_ends_the_run(runner: Runner) -> None:
    options = ["--pace", "async", "--workers", "2", "--servers", "1", "--assign", "round_robin"]
    ended = runner.run(ENDLESS, *options, args=["dies"])
    assert ended.code == 5, ended.err
    assert ended.error.startswith("worker 1 (pid ")
    assert "was killed by SIGKILL" in ended.error
    assert ended.answer["status"] == "failed"


def test_ctrl_c_ends_a_run_in_which_nobody_waits(runner: Runner) -> None:
    running = runner.start_run(ENDLESS, "--pace", "async", "--workers", "2", "--assign", "round_robin")
    running.until("own step 40\n")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert ended.code == 130, ended.err
    assert ended.answer["status"] == "interrupted"
    assert ended.metrics[-1]["step"] >= 20
