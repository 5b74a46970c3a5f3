"""Claims about workers that torchrun has started, on one host: that they train as paceline's own, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket

import pytest

from tests.process import standing
from tests.process.kills import COUNTING
from tests.process.runner import Ended, Runner, Running
from tests.process.test_left_out import SCRIPT as LEAVING_OUT
from tests.process.training import TRAINING, numbers

pytestmark = pytest.mark.timeout(300)  # five processes import torch, one after the other

# A step of two workers is one of a plain loop on their two batches, or on one that is twice as large.
TRAIN = """
import json
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

torch.set_default_dtype(torch.float64)
run = paceline.init()
torch.manual_seed(1)
inputs = torch.randn(60, 8)
wanted = inputs @ torch.randn(8, 1)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
loader = DataLoader(TensorDataset(inputs, wanted), batch_size=8 // run.num_workers)
model, optimizer, schedule, loader = run.wrap(model, optimizer, schedule, loader)
for epoch in range(3):
    for given, target in loader:
        optimizer.zero_grad()
        loss = ((model(given) - target) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
if run.is_main:
    with open(sys.argv[1], "w") as file:
        json.dump([p.detach().flatten().tolist() for p in model.parameters()], file)
"""

# Writes how often each sample was counted. With a second argument worker 1 dies in its third step of epoch 1, or does
# nothing any more, once.
COUNT = """
import json
import os
import shutil
import signal
import sys
import threading

from counting import job, mark

import paceline

samples, epochs = 64, 3
run = paceline.init()
counts, optimizer, loader = job(samples, shuffle=True)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(epochs):
    steps = 0
    for (numbers,) in loader:
        mark(counts, numbers)
        if len(sys.argv) > 1 and run.rank == 1 and (epoch, steps) == (1, 2) and not os.path.exists("died"):
            open("died", "w").close()
            if sys.argv[1] == "hang":
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        run.log(steps=steps)
        steps += 1
if run.is_main:
    with open("counts.json", "w") as file:
        json.dump(counts.detach().tolist(), file)
"""

FOREVER = """
import torch
import paceline

run = paceline.init()
weight = torch.nn.Parameter(torch.zeros(4))
optimizer = run.wrap(torch.optim.SGD([weight], lr=0.1))
for step in range(10**9):
    weight.grad = torch.ones(4)
    optimizer.step()
    if step == 3 and run.rank == 0:
        print("it trains", flush=True)
"""


def torchrun(runner: Runner, *arguments: str, **variables: str) -> Running:
    """``torchrun --standalone --nproc-per-node 2 ARGUMENTS``."""
    return runner.start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments, **variables)


def two_ranks() -> dict[str, str]:
    """What is in the environment of both."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def by_hand(runner: Runner, script: str, *arguments: str, **variables: str) -> list[Running]:
    """The same without an agent, which would end all processes of its host as soon as one of them has died."""
    variables = two_ranks() | variables
    return [runner.start(script, *arguments, RANK=str(rank), **variables) for rank in range(2)]


def counts(ended: Ended) -> list[float]:
    return list(json.loads((ended.folder / "counts.json").read_text()))


def test_two_workers_of_torchrun_are_one_process_on_the_whole_batch(runner: Runner) -> None:
    runner.write("train.py", TRAIN)
    ended = torchrun(runner, "train.py", "two.json").end()
    assert ended.code == 0, ended.err
    assert "paceline: worker" not in ended.err  # nobody was told to stop, or has lost home
    runner.python("train.py", "one.json")
    two, one = (json.loads((runner.folder / name).read_text()) for name in ("two.json", "one.json"))
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    assert (ended.summary["status"], ended.summary["workers"], ended.summary["steps"]) == ("done", 2, 24)
    # On one host what travels is the parameters to begin with; gradients are written where home reads them.
    assert ended.summary["bytes_sent"] == sum(map(len, one)) * 8


@pytest.mark.long
def test_what_is_left_out_is_told(runner: Runner) -> None:
    runner.write("train.py", LEAVING_OUT)
    ended = torchrun(runner, "train.py", "optimizer,all").end()
    assert ended.code == 0, ended.err
    (told,) = [event["text"] for event in ended.events if event.get("kind") == "alarm"]
    assert told.startswith("note: no loader was given to run.wrap")
    ended = torchrun(runner, "train.py", "loader", PACELINE_RUN_DIR="others").end()
    assert ended.code == 0, ended.err
    assert "note: weight and 1 more of a wrapped model were trained by an optimizer that is not" in ended.out


def test_workers_that_torchrun_starts_again_go_on_where_they_were(runner: Runner) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = torchrun(runner, "--max-restarts", "1", "count.py", "die").end()
    assert ended.code == 0, ended.err
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)
    assert "worker 1 is lost" in ended.out
    assert ended.out.count("home is at 127.0.0.1") == 1  # the home of the processes before them


@pytest.mark.long
@pytest.mark.parametrize("pace", ["sync", "quorum:1", "bounded:1", "async:2"])
def test_a_worker_that_is_started_again_by_hand_takes_its_place(runner: Runner, pace: str) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    variables = two_ranks() | {"PACELINE_PACE": pace}
    first, second = by_hand(runner, "count.py", "die", **variables)
    assert second.end().code == -signal.SIGKILL
    again = runner.start("count.py", "die", RANK="1", **variables)
    ended = first.end()
    assert (ended.code, again.end().code) == (0, 0), ended.err
    assert counts(ended) == [3.0] * 64
    assert "worker 1 is lost" in ended.out


@pytest.mark.long
def test_a_worker_that_does_nothing_loses_its_place(runner: Runner) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    variables = two_ranks() | {"PACELINE_HANG_TIMEOUT": "1"}
    first, second = by_hand(runner, "count.py", "hang", **variables)
    assert second.end().code == -signal.SIGKILL  # it had home's memory in use
    again = runner.start("count.py", "hang", RANK="1", **variables)
    ended = first.end()
    assert (ended.code, again.end().code) == (0, 0), ended.err
    assert counts(ended) == [3.0] * 64
    assert re.search("worker 1 is lost: it has done nothing for [1-9][0-9]* s while others wait for it", ended.out)


@pytest.mark.long
def test_a_killed_worker_ends_the_run_with_exit_code_5(runner: Runner) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = torchrun(runner, "count.py", "die").end()
    assert ended.code != 0
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("failed", 5)
    assert "is lost" in ended.summary["reason"]


@pytest.mark.long
@pytest.mark.parametrize("pace", ["sync", "bounded:2"])
def test_the_others_go_on_where_that_many_are_enough(runner: Runner, pace: str) -> None:
    """At sync batches are dealt by number: what the lost one had left of its part of the epoch is dealt anew."""
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    variables = {"PACELINE_MIN_WORKERS": "1", "PACELINE_PACE": pace, "PACELINE_RETURN_TIMEOUT": "1"}
    first, second = by_hand(runner, "count.py", "die", **variables)
    assert second.end().code == -signal.SIGKILL
    ended = first.end()
    assert ended.code == 0, ended.err
    assert ended.summary["pace"] == pace
    assert counts(ended) == [3.0] * 64
    assert "worker 1 has not come within 1 s; the other goes on without it" in ended.out


@pytest.mark.long
def test_control_c_ends_all_in_one_step(runner: Runner) -> None:
    runner.write("forever.py", FOREVER)
    running = torchrun(runner, "forever.py")
    running.until("it trains")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert ended.code != 0
    assert ended.summary["status"] == "interrupted"


@pytest.mark.long
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_termination_is_saved_and_the_run_goes_on_from_there(goes_on: bool, runner: Runner) -> None:
    """As of a job that SLURM or Kubernetes takes from its hosts: torchrun hears it, and tells its processes."""
    stands = "run.is_main and (epoch, steps) == (1, 3) and stand(1)"
    runner.write("counting.py", COUNTING)
    runner.write(
        "count.py", f"from standing import stand\n{COUNT}".replace("mark(counts", f"{stands}\n        mark(counts")
    )
    standing.prepare(runner, [1])
    running = torchrun(runner, "count.py")
    with standing.at(runner, running, 1) as events:
        running.signal(signal.SIGTERM)
        events.until("asked to stop: ")
        for pid in running.others():  # SLURM tells every process
            os.kill(pid, signal.SIGTERM)
    ended = running.end()
    assert ended.code != 0
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("interrupted", 130)
    assert [event["text"] for event in ended.events if event.get("kind") == "checkpoint"]
    if goes_on:
        again = torchrun(runner, "count.py", PACELINE_RESUME="last").end()
        assert again.code == 0, again.err
        assert counts(again) == [3.0] * 64


def test_what_home_refuses_ends_all(runner: Runner) -> None:
    runner.write("forever.py", FOREVER)
    first, second = by_hand(runner, "forever.py", PACELINE_PACE="fast")
    ended, theirs = first.end(), second.end()
    assert (ended.code, theirs.code) == (1, 1)
    assert "pace 'fast' is not known" in ended.err
    assert "home, beside rank 0, has not started: it ended with exit code 2" in theirs.err


@pytest.mark.long
def test_a_run_that_is_resumed_goes_on_to_the_bit(runner: Runner) -> None:
    """From the middle of a pass: random numbers, buffers and what the script keeps are those of either process."""
    standing.prepare(runner, [])
    runner.write("train.py", TRAINING)
    arguments = ("train.py", "3", "0")
    for running in by_hand(runner, *arguments, PACELINE_CHECKPOINT_EVERY="5", PACELINE_KEEP="9"):
        ended = running.end()
        assert ended.code == 0, ended.err
    expected = numbers(ended)
    (ended.directory / "numbers.json").unlink()
    for late in sorted((ended.directory / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    # By its name: ``last`` begins a new run where the newest is done.
    home, other = by_hand(runner, *arguments, PACELINE_RESUME=ended.directory.name, PACELINE_JSON="1")
    told = home.end()
    assert (told.code, other.end().code) == (0, 0), told.err
    assert "goes on behind step 15" in told.err
    assert numbers(told) == expected
