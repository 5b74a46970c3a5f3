"""Gradients that are not finite: dropped and told; after three in a row a worker is out, or the run is over."""

from __future__ import annotations

import json

import pytest

from tests.process.runner import Ended, Runner

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
if run.is_main:
    values = [p.tolist() for p in model.parameters()]
    (run.directory / "values.json").write_text(json.dumps(values))
"""


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Nothing is poisoned, and the script clips."""
    ended = Runner(tmp_path_factory.mktemp("clipped")).run(POISONED, args=["0", "nan", "clips"])
    assert ended.code == 0, ended.err
    return ended


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ("--pace sync", "nan"),
        # Dealt by number, so that worker 1 has as many steps as it takes.
        pytest.param("--pace async --assign round_robin", "inf", marks=pytest.mark.long),
        pytest.param("--pace local:2", "nan", marks=pytest.mark.long),
        pytest.param("--pace quorum:1 --assign round_robin", "inf", marks=pytest.mark.long),
    ],
)
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


def test_the_others_norm_is_without_it(clipped: Ended, runner: Runner) -> None:
    """All batches are alike, so the mean without one is the mean of all."""
    ended = runner.run(POISONED, args=["2,4", "nan", "clips"])
    assert ended.code == 0, ended.err
    found, wanted = (json.loads((run.directory / "values.json").read_text()) for run in (ended, clipped))
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)


@pytest.mark.parametrize("options", ["--pace bounded:2", pytest.param("--pace sync", marks=pytest.mark.long)])
def test_after_three_in_a_row_another_takes_the_workers_place(options: str, runner: Runner) -> None:
    once = POISONED.replace("step in bad", "step in bad and not healthy")
    once = once.replace("run = paceline.init()", 'run = paceline.init()\nhealthy = (run.directory / "once").exists()')
    once = once.replace("grad[0, 0] = value", 'grad[0, 0] = value\n        (run.directory / "once").touch()')
    ended = runner.run(once, *options.split(), args=["2,3,4", "nan"])
    assert ended.code == 0, ended.err
    (died,) = [event for event in ended.events if event.get("kind") == "died"]
    assert died["text"].startswith("worker 1: the gradient of step ")
    assert died["text"].endswith("the 3rd in a row; another takes its place")
    assert sum(metric["samples"] for metric in ended.metrics) >= 80 - 4  # what nobody told of a worker that ended


def test_who_is_out_once_more_than_it_may_be_replaced_ends_the_run(runner: Runner) -> None:
    always = ",".join(map(str, range(1, 20)))
    ended = runner.run(POISONED, "--restarts", "1", args=[always, "nan"])
    assert ended.code == 6, ended.err
    assert "worker 1: the gradient of step " in ended.error
    assert "most of the other workers' are finite" in ended.error
    assert [event["kind"] for event in ended.events if event.get("kind") in ("died", "failed")] == [
        "died",
        "died",
        "failed",
    ]


@pytest.mark.long
def test_without_restarts_the_others_may_go_on_without_it(runner: Runner) -> None:
    ended = runner.run(POISONED, "--restarts", "0", "--min-workers", "1", args=["2,3,4", "nan"])
    assert ended.code == 0, ended.err
    (died,) = [event for event in ended.events if event.get("kind") == "died"]
    assert died["text"].endswith("the other goes on without it")


@pytest.mark.parametrize("options", ["--pace sync", pytest.param("--pace bounded:2", marks=pytest.mark.long)])
def test_where_most_gradients_are_not_finite_the_run_ends_with_advice(options: str, runner: Runner) -> None:
    ended = runner.run(POISONED.replace("run.rank == 1 and", ""), *options.split(), args=["2,3,4,5", "nan"])
    assert ended.code == 6, ended.err
    assert "was not finite and was dropped; first in weight, in 1 of 2 parameters, the 3rd in a row" in ended.error
    assert "more than half of all workers' gradients of late were like it" in ended.error
    assert "lower the learning rate, try --clip 1" in ended.error


def test_clip_is_the_users_own_clipping_of_the_whole_gradient(clipped: Ended, runner: Runner) -> None:
    ours = runner.run(POISONED, "--clip", "0.01", args=["0", "nan"])
    assert ours.code == 0, ours.err
    mine, own = ((run.directory / "values.json").read_text() for run in (ours, clipped))
    assert mine == own
