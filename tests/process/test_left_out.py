"""A script that leaves out something of what it uses is told so at its end; one that does not hears nothing."""

from __future__ import annotations

import pytest

from tests.process.runner import Runner

SCRIPT = """
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline

model = torch.nn.Linear(2, 1)
frozen = torch.nn.Linear(2, 1).requires_grad_(False)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
run = paceline.init()
wraps = sys.argv[1].split(",")
model, frozen = run.wrap(model, frozen)
if "optimizer" in wraps:
    optimizer = run.wrap(optimizer)
if "loader" in wraps:
    batches = run.wrap(loader)
if "unread" in wraps:
    batches, _ = loader, run.wrap(loader)
if "rank" in wraps:
    batches = [batch for number, batch in enumerate(loader) if number % run.num_workers == run.rank]
if "all" in wraps:
    batches = loader
for (batch,) in batches:
    loss = model(batch).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("wraps", "said"),
    [
        ("optimizer,loader", []),
        ("optimizer,rank", []),
        ("optimizer,all", ["no loader was given to run.wrap"]),
        ("optimizer,unread", ["of the wrapped loader no batch was read"]),
        ("loader", ["weight and 1 more of a wrapped model were trained by an optimizer that is not wrapped"]),
    ],
)
def test_what_is_left_out_is_told(wraps: str, said: list[str], runner: Runner) -> None:
    ended = runner.run(SCRIPT, "--workers", "2", args=[wraps])
    assert ended.code == 0, ended.err
    told = [event["text"] for event in ended.events if event.get("kind") == "alarm"]
    assert len(told) == len(said)
    for text, begins in zip(told, said, strict=True):
        assert text.startswith(f"note: {begins}")
        assert text in ended.err


def test_one_worker_has_left_nothing_out(runner: Runner) -> None:
    ended = runner.run(SCRIPT, "--workers", "1", args=["optimizer,all"])
    assert ended.code == 0, ended.err
    assert not [event for event in ended.events if event.get("kind") == "alarm"]


# Data of each worker's own making: of torch's numbers, of numpy's, and split by Python's.
UNSEEDED = """
import random
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import paceline

if "apart" in sys.argv:
    random.seed()
numbers = list(range(64))
random.shuffle(numbers)
data = TensorDataset(torch.randn(64, 2), torch.from_numpy(np.random.randn(64)))
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
run = paceline.init()
model, optimizer, loader = run.wrap(model, optimizer, DataLoader(Subset(data, numbers[:48]), batch_size=4))
for inputs, wanted in loader:
    optimizer.zero_grad()
    (model(inputs)[:, 0] - wanted).pow(2).mean().backward()
    optimizer.step()
"""


@pytest.mark.parametrize("args", [[], ["apart"]])
def test_workers_whose_data_differ_are_told_of(args: list[str], runner: Runner) -> None:
    ended = runner.run(UNSEEDED, "--workers", "3", args=args)
    assert ended.code == 0, ended.err
    told = [event["text"] for event in ended.events if event.get("kind") == "alarm"]
    assert len(told) == len(args)
    assert all("do not have the same data" in text and text in ended.err for text in told)
