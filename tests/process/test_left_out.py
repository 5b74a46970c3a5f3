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
