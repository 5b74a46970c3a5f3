"""Claims about two hosts with several workers each: what those of a host bring crosses the network once, folded."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest
import torch

from paceline.params.table import tabulate
from paceline.transport.keys import new_job_key
from tests.engines.test_torchrun import TRAIN
from tests.hosts.namespaces import Host
from tests.hosts.resuming import is_resumed_to_the_bit
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running
from tests.process.training import TRAINING

pytestmark = pytest.mark.timeout(400)
MASTER_PORT = "29513"
EACH = 2
STEPS = 24

# Clips from the second epoch on. Every worker leaves its norms and what it has in the end.
CLIP = "nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
CLIPS = (
    TRAIN.replace("60", "64")
    .replace(CLIP, f"if epoch:\n            norms.append({CLIP}.item())")
    .replace("for epoch", "norms = []\nfor epoch")
    .replace("model.parameters()], file", "model.parameters()] + [norms], file")
)
LEAVES = CLIPS.replace("if run.is_main:\n    with open(sys.argv[1]", "if True:\n    with open(f'{run.rank}.json'")

# Worker DIES kills itself: in the midst of a backward pass, when its gradient is on the way already, or up to 20 ms
# after one, in its step or where it waits; where it clips, in that too, or between its norm and its step.
DIES = """
import json
import os
import random
import signal
import sys
import threading

import torch
from counting import job

import paceline

dies, moment, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run = paceline.init(min_workers=1, restarts=0, assign="lease")
counts, optimizer, loader = job(64)
optimizer, loader = run.wrap(optimizer, loader)
steps = 0


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def die(parameter):
    if run.rank == dies and steps == number and moment != "clipped":
        if moment == "backward":
            end()
        threading.Timer(random.Random(moment).random() * 0.02, end).start()


counts.register_post_accumulate_grad_hook(die)
for epoch in range(6):
    for (numbers,) in loader:
        optimizer.zero_grad()
        counts[numbers].sum().backward()
        if moment in ("norm", "clipped"):
            torch.nn.utils.clip_grad_norm_([counts], 0.1)
            if moment == "clipped" and run.rank == dies and steps == number:
                end()
        optimizer.step()
        steps += 1
if run.rank == (1 if dies == 0 else 0):
    with open("counts.json", "w") as file:
        json.dump(counts.detach().tolist(), file)
"""


def start(runner: Runner, hosts: tuple[Host, Host], *script: str, **variables: str) -> list[Running]:
    """EACH workers on each host, by rank."""
    if not (runner.folder / "job.key").exists():
        new_job_key(runner.folder / "job.key")
    place = {
        "WORLD_SIZE": str(EACH * len(hosts)),
        "LOCAL_WORLD_SIZE": str(EACH),
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": MASTER_PORT,
        "PACELINE_JOB_KEY_FILE": "job.key",
    }
    inside = [host.inside for host in hosts for _ in range(EACH)]
    place |= variables
    return [runner.start_in(where, *script, RANK=str(rank), **place) for rank, where in enumerate(inside)]


def test_two_workers_on_each_of_two_hosts_are_one_process(runner: Runner, hosts: tuple[Host, Host]) -> None:
    runner.write("train.py", CLIPS)
    runner.write("four.py", LEAVES)
    ended = [running.end() for running in reversed(start(runner, hosts, "four.py"))]
    assert [end.code for end in ended] == [0] * 4, "".join(end.err for end in ended)
    runner.python("train.py", "one.json")
    one, *four = (json.loads((runner.folder / f"{name}.json").read_text()) for name in ("one", *range(4)))
    for a, b in zip(four[0], one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    assert all(own == four[0] for own in four)  # to the bit, on both hosts
    assert len(one[-1]) == 2 * STEPS // 3
    assert max(one[-1]) > 1
    # Parameters to begin with, to home and to the mirror, there with their state; then a gradient a step in each
    # direction. Every other way needs half as much again, or more.
    # What was sent for a norm is the step's too.
    alike = [(str(place), 0, torch.zeros(len(values), dtype=torch.float64)) for place, values in enumerate(one[:-1])]
    table = tabulate(alike)
    gradient, summary = 8 * table.sizes["float64"], ended[-1].summary
    assert (summary["status"], summary["workers"], summary["steps"]) == ("done", 4, STEPS)
    assert 2 * STEPS * gradient < summary["bytes_sent"] < 2.5 * STEPS * gradient


@pytest.mark.long
@pytest.mark.parametrize("moment", ["backward", "a", "b", "c", "norm", "clipped"])
@pytest.mark.parametrize("dies", range(4))
def test_who_dies_on_either_host_is_missed_by_nobody_and_every_sample_counts_once(
    runner: Runner, hosts: tuple[Host, Host], dies: int, moment: str
) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("dies.py", DIES)
    all_ = start(runner, hosts, "dies.py", str(dies), moment, "5")
    assert all_[dies].end().code == -signal.SIGKILL
    ended = {rank: running.end() for rank, running in enumerate(all_) if rank != dies}
    assert [end.code for end in ended.values()] == [0] * 3, "".join(end.err for end in ended.values())
    assert json.loads((runner.folder / "counts.json").read_text()) == [6.0] * 64


@pytest.mark.long
@pytest.mark.parametrize("every", [5, 6])
def test_they_are_resumed_to_the_bit(runner: Runner, hosts: tuple[Host, Host], every: int) -> None:
    """From the middle of a pass, or its end; random numbers and buffers are those of each worker."""
    script = TRAINING.replace("int(sys.argv[1]), int(sys.argv[2])", "3, 0")
    is_resumed_to_the_bit(runner, script, partial(start, runner, hosts), every=every)
