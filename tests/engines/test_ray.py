"""Claims about workers in actors of Ray, on a cluster of several nodes, which are processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.process.kills import COUNTING
from tests.process.runner import ROOT, Runner

pytest.importorskip("ray", reason="Ray is not installed (make long installs it)")
pytestmark = pytest.mark.timeout(300)  # raylets, and two processes that import torch

# Writes how often each sample was counted, and what the schedule has come to. In its third step of epoch 1 each worker
# reads a byte from a pipe: it waits until the test has taken a node away.
COUNT = """
import json

import torch
from counting import job, mark

import paceline

samples, epochs = 64, 3
run = paceline.init()
counts, optimizer, loader = job(samples, shuffle=True)
optimizer.param_groups[0]["lr"] = 1.0
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
optimizer, schedule, loader = run.wrap(optimizer, schedule, loader)
for epoch in range(epochs):
    steps = 0
    for (numbers,) in loader:
        mark(counts, numbers)
        optimizer.step()
        schedule.step()
        run.log(steps=steps)
        steps += 1
        if (epoch, steps) == (1, 3):
            if run.is_main:
                print("it trains", flush=True)
            with open("gone", "rb", buffering=0) as pipe:
                pipe.read(1)
with open(f"schedule-{run.rank}.json", "w") as file:
    json.dump(schedule.last_epoch, file)
if run.is_main:
    with open("counts.json", "w") as file:
        json.dump(counts.detach().tolist(), file)
    print("all is counted")
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with room for one worker."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # paceline is on every node
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=node(1))
        yield made
        made.shutdown()


FOREVER = """
from counting import job, mark

import paceline

run = paceline.init()
counts, optimizer, loader = job(64)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(10**9):
    for (numbers,) in loader:
        mark(counts, numbers)
        optimizer.step()
    if epoch == 0 and run.is_main:
        print("it trains", flush=True)
"""

REFUSED = """
import sys

import paceline

run = paceline.init()
print("I am", run.rank, flush=True)
sys.exit(3)
"""


def node(cpus: int) -> dict[str, Any]:
    return {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 80 * 2**20}


def test_a_node_is_lost_and_one_comes_and_each_sample_counts_once(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    os.mkfifo(runner.folder / "gone")
    lost = cluster.add_node(**node(1))
    running = runner.start_run("count.py", "--engine", "ray", "--ray-address", cluster.address, "--workers", "2")
    with open(runner.folder / "gone", "r+b", buffering=0) as pipe:
        running.until("it trains")
        cluster.remove_node(lost, allow_graceful=False)
        running.until("is lost")  # its processes outlive their node for a moment
        pipe.write(bytes(9))  # one for each process that comes there, now or later
        cluster.add_node(**node(1))
        ended = running.end()
    assert ended.code == 0, ended.err
    assert json.loads((runner.folder / "counts.json").read_text()) == [3.0] * 64
    assert (ended.answer["status"], ended.answer["workers"], ended.answer["samples"]) == ("done", 2, 3 * 64)
    assert "all is counted\n" in ended.out
    schedules = sorted(json.loads((runner.folder / f"schedule-{rank}.json").read_text()) for rank in range(2))
    assert schedules[0] == 24
    assert schedules[1] >= 24  # the newcomer's was the other's when it joined, which had ended its part of the epoch


@pytest.mark.long
def test_a_node_that_comes_is_used_until_control_c_ends_all(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("forever.py", FOREVER)
    cluster.add_node(**node(1))
    options = ("--engine", "ray", "--ray-address", cluster.address, "--workers", "2", "--max-workers", "3")
    running = runner.start_run("forever.py", *options, "--pace", "bounded:2")
    running.until("it trains")
    cluster.add_node(**node(1))
    running.until("3 workers instead of 2")
    running.until("worker 2 trains with the others")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert (ended.code, ended.summary["status"], ended.summary["workers"]) == (130, "interrupted", 3)


@pytest.mark.long
def test_a_script_that_exits_ends_the_run_in_words(runner: Runner, cluster: Any) -> None:
    runner.write("refused.py", REFUSED)
    options = ("--engine", "ray", "--ray-address", cluster.address, "--workers", "1")
    ended = runner.start_run("refused.py", *options).end()
    assert ended.code == 1
    assert "worker 0: the script exited with 3" in ended.error
    assert "I am 0\n" in ended.out
