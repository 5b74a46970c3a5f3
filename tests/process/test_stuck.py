"""Processes that do not get on: they are killed, and others take their places."""

from __future__ import annotations

import pytest

from tests.process.runner import Runner

# Worker 1 comes to a stop once; a server where there is one.
STUCK = """
import json
import os
import signal
import sys
import threading
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

how = sys.argv[1]


def first_time():
    try:
        os.close(os.open("stuck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


run = paceline.init()
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4)
model, optimizer, loader = run.wrap(model, optimizer, loader)
for epoch in range(2):
    for step, (x,) in enumerate(loader):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        if epoch == 0 and step == 4 and run.rank == 1 and first_time():
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "hangs":
                threading.Event().wait()
            if how == "spins":
                while True:
                    pass
            if how == "server":
                processes = json.loads((run.directory / "run.json").read_text())["processes"]
                os.kill(next(p["pid"] for p in processes if p["role"] == "server"), signal.SIGSTOP)
        optimizer.step()
        if how == "evaluates" and epoch == 0 and step == 4 and run.rank == 1 and first_time():
            until_s = time.process_time() + 3
            while time.process_time() < until_s:
                model(x)
print("the end")
"""


LONG = [  # the same faults at another pace, and what spinning shows too
    ("stops", "--pace bounded:1", "worker", "has been stopped for 1."),
    ("hangs", "--pace sync --hang-timeout 1", "worker", "has done nothing for 1 s while others wait for it"),
    ("spins", "--pace bounded:1 --hang-timeout 1", "worker", "has not finished a step for 1 s while others wait"),
]


@pytest.mark.parametrize(
    ("how", "options", "role", "told"),
    [
        ("stops", "--pace sync", "worker", "has been stopped for 1."),
        ("spins", "--pace sync --hang-timeout 1", "worker", "has not finished a step for 1 s while others wait for it"),
        ("server", "--pace sync --servers 1", "server", "has been stopped for 1."),
        *(pytest.param(*setting, marks=pytest.mark.long) for setting in LONG),
    ],
)
def test_who_does_not_get_on_is_replaced(how: str, options: str, role: str, told: str, runner: Runner) -> None:
    ended = runner.run(STUCK, *options.split(), args=[how])
    assert ended.code == 0, ended.err
    kinds = [(event.get("kind"), event.get("role")) for event in ended.events]
    assert ("stuck", role) in kinds
    assert ("died", role) in kinds
    assert told in next(event["text"] for event in ended.events if event.get("kind") == "stuck")
    assert ended.log(1).splitlines()[-1] == "the end"


def test_who_computes_between_its_steps_is_left_alone(runner: Runner) -> None:
    ended = runner.run(STUCK, "--hang-timeout", "1", args=["evaluates"])
    assert ended.code == 0, ended.err
    assert {"stuck", "died"}.isdisjoint(event.get("kind") for event in ended.events)
