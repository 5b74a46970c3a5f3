"""Gradients that are not finite: dropped, told, and after three in a row the end with advice; clipping from outside."""

from __future__ import annotations

import json

import pytest

from tests.process.runner import Runner

# Worker 1's batches of some steps are poisoned; worker 0 leaves what came of it.
POISONED = """
import json
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

bad, value, clips = [int(n) for n in sys.argv[1].split(",")], float(sys.argv[2]), sys.argv[3:] == ["clips"]
run = paceline.init()
torch.manual_seed(0)
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.ones(80, 4)), batch_size=4)
model, optimizer, loader = run.wrap(model, optimizer, loader)
for step, (x,) in enumerate(loader, 1):
    optimizer.zero_grad()
    loss = (model(x) - 1).pow(2).mean()
    loss.backward()
    if run.rank == 1 and step in bad:
        model.weight.grad[0, 0] = value
    if clips:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    run.log(loss=loss)
if run.is_main:
    values = [p.tolist() for p in model.parameters()]
    (run.directory / "values.json").write_text(json.dumps(values))
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("options", ["--pace sync", "--pace async", "--pace local:2", "--pace quorum:1"])
def test_a_gradient_that_is_not_finite_is_dropped_and_told(options: str, value: str, runner: Runner) -> None:
    ended = runner.run(POISONED, *options.split(), args=["2,3,5", value])
    assert ended.code == 0, ended.err
    (weight,), _ = json.loads((ended.directory / "values.json").read_text())
    assert all(abs(one) < 10 for one in weight)
    told = [event["text"] for event in ended.events if event.get("kind") == "alarm"]
    assert len(told) == 3
    assert all("was not finite and was dropped" in text and text.startswith("worker 1: ") for text in told)
    assert [text[-15:] for text in told] == [
        "(1 of 3 in a row)"[-15:],
        "(2 of 3 in a row)"[-15:],
        "(1 of 3 in a row)"[-15:],
    ]


def test_the_others_norm_is_without_it(runner: Runner) -> None:
    """All batches are alike, so the mean without one is the mean of all."""
    expected = runner.run(POISONED, args=["0", "nan", "clips"])
    ended = runner.run(POISONED, args=["2,4", "nan", "clips"])
    assert ended.code == 0, ended.err
    assert (ended.directory / "values.json").read_text() != "[]"
    found, wanted = (json.loads((run.directory / "values.json").read_text()) for run in (ended, expected))
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)


@pytest.mark.parametrize("options", ["--pace sync", "--pace bounded:2"])
def test_three_in_a_row_end_the_run_with_advice(options: str, runner: Runner) -> None:
    ended = runner.run(POISONED, *options.split(), args=["2,3,4", "nan"])
    assert ended.code == 6, ended.err
    assert "was not finite and was dropped, the 3rd in a row" in ended.error
    assert "a lower learning rate" in ended.error


def test_clip_is_the_users_own_clipping_of_the_whole_gradient(runner: Runner) -> None:
    own = runner.run(POISONED, args=["0", "nan", "clips"])
    ours = runner.run(POISONED, "--clip", "0.01", args=["0", "nan"])
    first, second = sorted(runner.folder.glob("runs/*/values.json"))
    assert (own.code, ours.code) == (0, 0)
    assert first.read_text() == second.read_text()
