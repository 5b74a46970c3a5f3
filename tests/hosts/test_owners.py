"""Claims about three hosts and more with a worker on each, which fold what all bring in shares, one each."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from paceline.params.table import tabulate
from paceline.transport.keys import new_job_key
from tests.engines.test_torchrun import TRAIN
from tests.hosts.namespaces import Host, missing, some_hosts
from tests.hosts.resuming import is_resumed_to_the_bit
from tests.hosts.test_folds import DIES, STEPS
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running
from tests.process.training import TRAINING

pytestmark = pytest.mark.timeout(400)
MASTER_PORT = "29515"

# Without clipping, whose norm is that of gradients at home; every worker leaves what it has in the end.
TRAINS = TRAIN.replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass").replace("60", "64")
LEAVES = TRAINS.replace("if run.is_main:\n    with open(sys.argv[1]", "if True:\n    with open(f'{run.rank}.json'")

# All samples an epoch, by number, in passes that are not equally long; the last batches are smaller than the others.
# Workers wait in step 3 for what the test does meanwhile.
COUNTS = """
import json
import sys

from counting import job

import paceline

waits = len(sys.argv) > 1
run = paceline.init()
counts, optimizer, loader = job(62)
optimizer, loader = run.wrap(optimizer, loader)
steps = 0
for epoch in range(4):
    for (numbers,) in loader:
        optimizer.zero_grad()
        counts[numbers].sum().backward()
        if waits and steps == 3:
            print("is there", flush=True)
            open(f"go{run.rank}").read()
        optimizer.step()
        steps += 1
with open(f"counts{run.rank}.json", "w") as file:
    json.dump(counts.detach().tolist(), file)
"""


@pytest.fixture(params=[4])
def several(request: pytest.FixtureRequest) -> Iterator[tuple[Host, ...]]:
    """So many hosts that reach each other."""
    why = missing()
    if why:
        pytest.skip(why)
    with some_hosts(request.param) as hosts:
        yield hosts


def start(runner: Runner, hosts: tuple[Host, ...], *script: str, **variables: str) -> list[Running]:
    """A worker on each host, by rank."""
    if not (runner.folder / "job.key").exists():
        new_job_key(runner.folder / "job.key")
    place = {
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": MASTER_PORT,
        "PACELINE_JOB_KEY_FILE": "job.key",
    }
    place |= variables
    return [runner.start_in(host.inside, *script, RANK=str(rank), **place) for rank, host in enumerate(hosts)]


def test_four_hosts_are_one_process(runner: Runner, several: tuple[Host, ...]) -> None:
    runner.write("train.py", TRAINS)
    runner.write("four.py", LEAVES)
    ended = [running.end() for running in reversed(start(runner, several, "four.py"))]
    assert [end.code for end in ended] == [0] * 4, "".join(end.err for end in ended)
    runner.python("train.py", "one.json")
    one, *four = (json.loads((runner.folder / f"{name}.json").read_text()) for name in ("one", *range(4)))
    for a, b in zip(four[0], one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    assert all(own == four[0] for own in four)  # to the bit, on all hosts
    # Parameters to begin with, to home and to three mirrors, there with their state; then each host sends three
    # quarters of its gradient, and its quarter of the fold to three others.
    tensors = [torch.zeros(len(values), dtype=torch.float64) for values in one]
    table = tabulate((str(place), 0, tensor) for place, tensor in enumerate(tensors))
    gradient, summary = 8 * table.sizes["float64"], ended[-1].summary
    assert (summary["status"], summary["workers"], summary["steps"]) == ("done", 4, STEPS)
    assert summary["bytes_sent"] < 7 * STEPS * gradient  # of a star: 3 gradients, and 3 times the parameters


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
def test_passes_may_be_uneven(runner: Runner, several: tuple[Host, ...]) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("counts.py", COUNTS)
    ended = [running.end() for running in reversed(start(runner, several, "counts.py"))]
    assert [end.code for end in ended] == [0] * 3, "".join(end.err for end in ended)
    for rank in range(3):
        assert json.loads((runner.folder / f"counts{rank}.json").read_text()) == [4.0] * 62


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
@pytest.mark.parametrize("moment", ["backward", "a", "b", "c"])
@pytest.mark.parametrize("dies", range(3))
def test_who_dies_is_missed_by_nobody_and_every_sample_counts_once(
    runner: Runner, several: tuple[Host, ...], dies: int, moment: str
) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("dies.py", DIES)
    all_ = start(runner, several, "dies.py", str(dies), moment, "5")
    assert all_[dies].end().code == -signal.SIGKILL
    ended = {rank: running.end() for rank, running in enumerate(all_) if rank != dies}
    assert [end.code for end in ended.values()] == [0] * 2, "".join(end.err for end in ended.values())
    assert json.loads((runner.folder / "counts.json").read_text()) == [6.0] * 64


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
@pytest.mark.parametrize("places", [(0, 1, 1, 2), (0, 0, 1, 2)])
@pytest.mark.parametrize("dies", [-1, 0, 1, 2, 3])
def test_so_it_is_with_several_workers_on_one_of_them(
    runner: Runner, several: tuple[Host, ...], places: tuple[int, ...], dies: int
) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("dies.py", DIES)
    all_ = start(runner, tuple(several[place] for place in places), "dies.py", str(dies), "a", "5")
    ended = [running.end() for running in reversed(all_)][::-1]
    codes = [-signal.SIGKILL if rank == dies else 0 for rank in range(4)]
    assert [end.code for end in ended] == codes, "".join(end.err for end in ended)
    assert json.loads((runner.folder / "counts.json").read_text()) == [6.0] * 64


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
def test_two_that_do_not_reach_each_other_any_more_send_what_they_bring_home(
    runner: Runner, several: tuple[Host, ...]
) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("counts.py", COUNTS)
    for rank in range(3):
        os.mkfifo(runner.folder / f"go{rank}")
    all_ = start(runner, several, "counts.py", "waits")
    for running in all_:
        running.until("is there")
    several[1].cut_from(several[2])
    for rank in range(3):
        runner.write(f"go{rank}", "")
    ended = [running.end() for running in reversed(all_)]
    assert [end.code for end in ended] == [0] * 3, "".join(end.err for end in ended)
    for rank in range(3):
        assert json.loads((runner.folder / f"counts{rank}.json").read_text()) == [4.0] * 62


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
def test_they_are_resumed_to_the_bit(runner: Runner, several: tuple[Host, ...]) -> None:
    script = TRAINING.replace("int(sys.argv[1]), int(sys.argv[2])", "3, 0")
    is_resumed_to_the_bit(runner, script, partial(start, runner, several))
