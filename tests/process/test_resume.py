"""A run goes on from its checkpoint: to the bit with as many workers, with each sample once whatever is changed."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from tests.process import kills, standing
from tests.process.runner import Ended, Runner
from tests.process.training import TRAINING, numbers


def trained(runner: Runner, *options: str, args: list[str]) -> Ended:
    standing.prepare(runner, [])
    return runner.run(TRAINING, *options, args=args)


def interrupted(runner: Runner, script: str, *options: str, args: list[str], place: int) -> Ended:
    """Ctrl-C while worker 0 stands there: a checkpoint is saved."""
    standing.prepare(runner, [place])
    running = runner.start_run(script, *options, args=args)
    with standing.at(runner, running, place) as events:
        running.signal(signal.SIGINT)
        events.until("asked to stop: ")
    ended = running.end()
    assert ended.code == 130, ended.err
    (saved,) = [event["text"] for event in ended.events if event.get("kind") == "checkpoint"]
    assert "is saved in" in saved
    assert f"  next    paceline resume {ended.directory.name}" in ended.err.splitlines()
    return ended


def resumed(runner: Runner, ended: Ended, *options: str) -> Ended:
    return runner.paceline("resume", "--json", *options, str(ended.directory))


@pytest.mark.parametrize(
    ("options", "stop_at"),  # in the first pass, or in the third
    [
        ("--pace sync", 7),
        pytest.param("--pace local:3", 30, marks=pytest.mark.long),
        pytest.param("--pace sync", 30, marks=pytest.mark.long),
        pytest.param("--pace sync --servers 1", 10, marks=pytest.mark.long),
    ],
)
def test_ctrl_c_and_resume_leave_the_same_bits(options: str, stop_at: int, runner: Runner) -> None:
    """After Ctrl-C in the middle of a pass of 12 steps."""
    whole = trained(runner, *options.split(), args=["4", "0"])
    expected = numbers(whole)
    first = interrupted(runner, TRAINING, *options.split(), args=["4", str(stop_at)], place=stop_at)
    ended = resumed(runner, first)
    assert numbers(ended) == expected
    steps = [metric["step"] for metric in ended.metrics]
    assert steps == [metric["step"] for metric in whole.metrics]
    assert ended.summary["samples"] == whole.summary["samples"]


def test_a_run_goes_on_from_its_newest_good_checkpoint(runner: Runner) -> None:
    first = trained(runner, "--checkpoint-every", "10", "--keep", "9", args=["3", "0"])
    expected = numbers(first)
    *before, newest = sorted((first.directory / "checkpoints").iterdir())
    (first.directory / "numbers.json").unlink()
    told = "goes on behind step"
    if before:  # one that comes while another is written may not be
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (newest / "model.safetensors").write_bytes(data)
        told = f"warning: {newest.name} cannot be used: "
    ended = resumed(runner, first)
    assert numbers(ended) == expected
    assert told in ended.err


@pytest.mark.parametrize(
    ("options", "then"),
    [
        ("--pace async", "--workers 4 --servers 1"),
        pytest.param("--pace sync", "--workers 3", marks=pytest.mark.long),
        pytest.param("--pace sync --assign hash", "--workers 1", marks=pytest.mark.long),
        pytest.param("--pace bounded:1", "--assign round_robin", marks=pytest.mark.long),
        pytest.param("--pace quorum:2 --workers 3", "", marks=pytest.mark.long),
        pytest.param("--pace sync --servers 2", "--pace async --workers 3", marks=pytest.mark.long),
    ],
)
def test_whatever_is_changed_each_sample_counts_once_an_epoch(options: str, then: str, runner: Runner) -> None:
    samples, epochs = 900, 3
    runner.write("counting.py", kills.COUNTING)
    script = "from standing import stand\n" + kills.SCRIPT.replace(
        "steps += 1\n", "steps += 1\n        run.is_main and (epoch, steps) == (1, 20) and stand(20)\n"
    )
    arguments = [str(samples), str(epochs), "0", "0.0", "1"]
    first = interrupted(runner, script, *options.split(), args=arguments, place=20)
    ended = resumed(runner, first, *then.split())
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [epochs] * samples


@pytest.mark.long
def test_a_scheduler_that_cannot_be_kept_is_told_and_trained_with(runner: Runner) -> None:
    own = "class Own(torch.optim.lr_scheduler.StepLR):\n    pass\n\n\n"
    own += "by_step = Own(optimizer, 7)\nby_step.rule = print\n"
    script = TRAINING.replace("plateau = ", own + "plateau = ")
    standing.prepare(runner, [])
    ended = runner.run(script, args=["1", "0"])
    assert ended.code == 0, ended.err
    (told,) = [event["text"] for event in ended.events if event.get("kind") == "alarm"]
    assert told.startswith("checkpoints will be without the Own: Own.rule is a builtins.builtin_function_or_method")


def test_the_checkpoint_is_what_plain_pytorch_knows_and_what_cannot_be_resumed_is_told(runner: Runner) -> None:
    from safetensors.torch import load_file

    first = interrupted(runner, TRAINING, args=["1000000", "5"], place=5)
    (path,) = (first.directory / "checkpoints").iterdir()
    model = load_file(path / "model.safetensors")
    assert set(model) == {f"{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")} | {
        f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert model["0.weight"].shape == (16, 6)
    state = load_file(path / "optimizer.safetensors")
    assert state["0.weight/exp_avg"].shape == (16, 6)

    script = runner.folder / "train.py"
    script.write_text(script.read_text().replace("16", "17"))
    other = resumed(runner, first)
    assert other.code == 3
    assert "does not fit the model: parameter 0.weight is [17, 6], the checkpoint has it as [16, 6]" in other.err
    shutil.rmtree(first.directory / "checkpoints")
    refused = resumed(runner, first)
    assert refused.code == 3
    assert "there is no checkpoint in" in refused.err


# Worker 0 leaves a mark behind each of six passes of four steps.
MARKS = """
import sys

import torch
from standing import stand
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

run = paceline.init()
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.ones(32, 2)), batch_size=4)
model, optimizer, loader = run.wrap(model, optimizer, loader)
for epoch in range(6):
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        if run.is_main and run.step == int(sys.argv[1]):
            stand(run.step)
    if run.is_main:
        with open("marks", "a") as file:
            file.write(f"{epoch} ")
"""


@pytest.mark.parametrize("stop_at", [18, pytest.param(20, marks=pytest.mark.long)])  # in the fifth pass
@pytest.mark.parametrize("how", ["resumed", "replaced"])
def test_what_worker_0_does_behind_each_pass_is_done_once(how: str, stop_at: int, runner: Runner) -> None:
    """By a script that does again what lies behind it: the best model is not written over by a worse one."""
    if how == "resumed":
        ended = resumed(runner, interrupted(runner, MARKS, args=[str(stop_at)], place=stop_at))
    else:
        standing.prepare(runner, [stop_at])
        running = runner.start_run(MARKS, args=[str(stop_at)])
        running.until(f"stands at {stop_at}.")
        info = json.loads((max((runner.folder / "runs").iterdir()) / "run.json").read_text())
        (pid,) = [p["pid"] for p in info["processes"] if (p["role"], p["rank"]) == ("worker", 0)]
        os.kill(pid, signal.SIGKILL)
        ended = running.end()
    assert ended.code == 0, ended.err
    assert (runner.folder / "marks").read_text() == "0 1 2 3 4 5 "


# Behind a pass of ten rounds, before the batches that are left of the next one.
ASKED_EARLY = """
import os
import signal

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline
from standing import stand
from counting import Count

run = paceline.init()
weight = torch.nn.Parameter(torch.zeros(()))
optimizer = torch.optim.SGD([weight], lr=0.1)
count = Count()
run.keep(count)
loader = DataLoader(TensorDataset(torch.ones(20)), batch_size=1)
others = DataLoader(TensorDataset(torch.ones(1)), batch_size=1)
optimizer, loader, others = run.wrap(optimizer, loader, others)
for epoch in range(2):
    if epoch and os.path.exists("again"):
        if run.rank == 0 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad():
            for _ in others:
                continue
    for (x,) in loader:
        (weight * x).sum().backward()
        optimizer.step()
        count.steps += 1
        if run.is_main and epoch and not os.path.exists("again"):
            stand(12)
print(f"worker {run.rank} has counted {count.steps}")
"""
COUNT = """
class Count:
    steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
"""


@pytest.mark.long
def test_who_has_not_taken_up_what_it_keeps_tells_a_newcomer_what_the_checkpoint_has(runner: Runner) -> None:
    """Worker 1 has nothing of an evaluation before its first batch, and waits there for worker 0, which dies."""
    runner.write("counting.py", COUNT)
    first = interrupted(runner, ASKED_EARLY, args=[], place=12)
    runner.write("again", "")
    ended = resumed(runner, first)
    assert ended.code == 0, ended.err
    assert (ended.folder / "died").exists()
    assert [ended.log(rank).splitlines()[-1] for rank in (0, 1)] == [f"worker {rank} has counted 20" for rank in (0, 1)]
