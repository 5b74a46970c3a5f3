"""What is stepped with every batch is right in a newcomer too, though its script has run a batch a pass."""

from __future__ import annotations

import pytest

from tests.process.runner import Runner

# Every gradient is 1, so the final weight is minus the sum of the learning rates of all rounds. Worker 0's count.
SCRIPT = """
import os
import signal
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline


class Count:
    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def rate(step):
    return 1.0 / (1 + step)


run = paceline.init()
weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
optimizer = torch.optim.SGD([weight], lr=1.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
count = Count()
run.keep(count)
loader = DataLoader(TensorDataset(torch.ones(60)), batch_size=3)
optimizer, scheduler, loader = run.wrap(optimizer, scheduler, loader)
first = True
for epoch in range(3):
    for batch, (x,) in enumerate(loader):
        if run.rank == int(sys.argv[1]) and epoch == 1 and count.steps >= 14 and first:
            try:
                os.close(os.open("died", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                first = False
        (weight * x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        count.steps += 1
assert weight.item() == -sum(map(rate, range(run.step))) or sys.argv[2] != "rounds", (weight.item(), run.step)
print(f"worker {run.rank} of {run.step} steps has counted {count.steps}, scheduler {scheduler.last_epoch}")
"""


@pytest.mark.parametrize("servers", ["0", pytest.param("1", marks=pytest.mark.long)])
def test_worker_0s_newcomer_sets_the_rate_that_the_schedule_has_by_then(servers: str, runner: Runner) -> None:
    ended = runner.run(SCRIPT, "--servers", servers, args=["0", "rounds"])
    assert ended.code == 0, ended.err + ended.log(0)
    assert (ended.folder / "died").exists()
    steps = ended.summary["steps"]
    assert steps >= 30  # rounds that the newcomer missed were the other's alone, and at the end of the pass its own
    last = ended.log(0).splitlines()[-1]
    assert last == f"worker 0 of {steps} steps has counted {steps}, scheduler {steps}"


@pytest.mark.parametrize(
    "pace", ["local:2", *(pytest.param(pace, marks=pytest.mark.long) for pace in ("quorum:1", "async", "bounded:1"))]
)
def test_at_every_pace_a_newcomer_goes_on_where_another_is(pace: str, runner: Runner) -> None:
    ended = runner.run(SCRIPT, "--pace", pace, args=["1", pace])
    assert ended.code == 0, ended.err + ended.log(1)
    assert (ended.folder / "died").exists()
    words = ended.log(1).splitlines()[-1].split()
    # Ghosts alone would have left it with as many as there are batches after its death, and one more.
    assert int(words[7].rstrip(",")) == int(words[9]) > 14
