"""A DataLoader's own processes inside a run."""

from __future__ import annotations

import json

import pytest

from tests.process.runner import Runner

SCRIPT = """
import json
import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import paceline


class Numbers(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return index, get_worker_info().id, os.getpid()


keep = sys.argv[1] == "keep"
run = paceline.init()
weight = nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
loader = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=keep)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(2):
    for numbers, loaders, pids in loader:
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
        print(json.dumps([numbers.tolist(), loaders.tolist(), pids.tolist()]))
"""


@pytest.mark.parametrize("how", ["keep", pytest.param("anew", marks=pytest.mark.long)])
def test_its_processes_load_for_each_worker_and_end_with_the_run(how: str, runner: Runner) -> None:
    ended = runner.run(SCRIPT, args=[how])
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err + ended.log(0) + ended.log(1)
    said = [[line for line in ended.log(rank).splitlines() if line.startswith("[[")] for rank in (0, 1)]
    batches = [[json.loads(line) for line in own] for own in said]  # torch warns where there are fewer cores
    drawn = sorted(number for own in batches for numbers, _, _ in own for number in numbers)
    assert drawn == sorted([*range(50)] * 2)
    processes = {pid for own in batches for _, _, pids in own for pid in pids}
    assert len(processes) == (4 if how == "keep" else 8)
    assert {loader for own in batches for _, loaders, _ in own for loader in loaders} == {0, 1}
