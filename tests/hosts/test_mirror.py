"""Claims about two hosts that exchange gradients: home, whose worker maps its memory, and one with a mirror of it."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from tests.engines.test_torchrun import TRAIN
from tests.hosts.namespaces import Host
from tests.hosts.test_training import start
from tests.process import standing
from tests.process.kills import COUNTING
from tests.process.runner import Runner
from tests.process.training import TRAINING, numbers

pytestmark = pytest.mark.timeout(400)

# Worker 1 dies in the midst of a backward pass, when its gradient is on the way already.
DIES = """
import json
import os
import signal

import torch
from counting import job

import paceline

run = paceline.init(min_workers=1, restarts=0, assign="lease")
counts, optimizer, loader = job(64)
optimizer, loader = run.wrap(optimizer, loader)
steps = 0


def die(parameter):
    if run.rank == 1 and steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)


counts.register_post_accumulate_grad_hook(die)
for epoch in range(3):
    for (numbers,) in loader:
        optimizer.zero_grad()
        counts[numbers].sum().backward()
        optimizer.step()
        steps += 1
if run.is_main:
    with open("counts.json", "w") as file:
        json.dump(counts.detach().tolist(), file)
"""


@pytest.mark.long  # test_folds.py has two workers on each
def test_two_hosts_are_one_process_on_the_whole_batch(runner: Runner, hosts: tuple[Host, Host]) -> None:
    runner.write("train.py", TRAIN)
    runner.write("two.py", TRAIN.replace("sys.argv[1]", "'two.json'"))
    first, second = start(runner, hosts, "two.py")
    theirs, ended = second.end(), first.end()
    assert (ended.code, theirs.code) == (0, 0), ended.err + theirs.err
    runner.python("train.py", "one.json")
    two, one = (json.loads((runner.folder / name).read_text()) for name in ("two.json", "one.json"))
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    assert ended.summary["status"] == "done"


@pytest.mark.long
def test_a_gradient_that_was_on_the_way_when_its_worker_died_does_not_count(
    runner: Runner, hosts: tuple[Host, Host]
) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("dies.py", DIES)
    first, second = start(runner, hosts, "dies.py")
    assert second.end().code == -signal.SIGKILL
    ended = first.end()
    assert ended.code == 0, ended.err
    assert "worker 1 is lost" in ended.err + ended.out
    assert json.loads((runner.folder / "counts.json").read_text()) == [3.0] * 64


@pytest.mark.long
def test_two_hosts_that_are_resumed_go_on_to_the_bit(runner: Runner, hosts: tuple[Host, Host]) -> None:
    """From the middle of a pass; home's worker maps its memory and the other has a mirror of it, as before."""
    standing.prepare(runner, [])
    runner.write("train.py", TRAINING.replace("int(sys.argv[1]), int(sys.argv[2])", "3, 0"))
    first, second = start(runner, hosts, "train.py", PACELINE_CHECKPOINT_EVERY="5", PACELINE_KEEP="9")
    assert second.end().code == 0
    whole = first.end()
    expected = numbers(whole)
    (whole.directory / "numbers.json").unlink()
    for late in sorted((whole.directory / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    # By its name: ``last`` begins a new run where the newest is done.
    name = whole.directory.name
    first, second = start(runner, hosts, "train.py", secure=False, PACELINE_RESUME=name, PACELINE_JSON="1")
    assert second.end().code == 0
    resumed = first.end()
    assert "goes on behind step 15" in resumed.err
    assert numbers(resumed) == expected
