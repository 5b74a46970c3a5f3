"""Leases with real processes: prefetching loaders, and a worker ten times slower than the others."""

from __future__ import annotations

import pytest

from tests.process.runner import Runner

COUNTS = """
import time
import torch
from torch.utils.data import DataLoader, Dataset
import paceline

SAMPLES, EPOCHS = 240, 2


class Numbers(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        return float(number)


def main():
    run = paceline.init()
    weight = torch.nn.Parameter(torch.zeros(SAMPLES, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=LOADERS)
    optimizer, loader = run.wrap(optimizer, loader)
    mine = 0
    for _ in range(EPOCHS):
        for batch in loader:
            begun = time.monotonic()
            work_s = 0.02 if run.rank == 0 else 0.002
            while time.monotonic() - begun < work_s:  # a slow machine
                torch.ones(1000).sum()
            weight.grad = torch.zeros_like(weight)
            weight.grad[batch.long()] = -1.0
            optimizer.step()
            mine += 1
    print("mine", mine, flush=True)
    print("weights", sorted(set(weight.tolist())), flush=True)


main()
"""


@pytest.mark.parametrize(
    ("pace", "servers", "loaders"),
    [
        pytest.param("async", 1, 0, marks=pytest.mark.long),
        ("quorum:1", 0, 2),
        pytest.param("async", 0, 2, marks=pytest.mark.long),
        pytest.param("bounded:2", 0, 2, marks=pytest.mark.long),
    ],
)
def test_with_a_worker_ten_times_slower_each_sample_counts_once(
    pace: str, servers: int, loaders: int, runner: Runner
) -> None:
    runner.write("count.py", COUNTS.replace("LOADERS", str(loaders)))
    options = ["--pace", pace, "--workers", "2", "--servers", str(servers), "--assign", "lease"]
    ended = runner.start("-m", "paceline", "run", *options, "count.py").end()
    assert ended.code == 0, f"{ended.out}\n{ended.err}"
    assert "weights [2.0]" in ended.out


LEAVES = """
import os
import torch
from torch.utils.data import DataLoader
import paceline


def main():
    run = paceline.init()
    weight = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loader = DataLoader(range(16), num_workers=1, prefetch_factor=4)
    optimizer, loader = run.wrap(optimizer, loader)
    mine = []
    for (number,) in loader:
        weight.grad = torch.zeros_like(weight)
        weight.grad[number] = -1.0
        optimizer.step()
        mine.append(int(number))
        if run.rank == 0 and len(mine) == 1:
            while not os.path.exists("drawn"):  # four more are drawn ahead, until worker 1 takes them back
                pass
        if run.rank == 1 and len(mine) == 11:
            open("drawn", "w").close()
            while not run.worker.context.board.parked[0]:
                pass
            break
    if run.rank == 0:
        print("mine", len(mine), "weights", sorted(set(weight.tolist())), flush=True)


main()
"""


def test_what_a_leaver_has_drawn_ahead_goes_to_who_has_found_nothing_left(runner: Runner) -> None:
    """Worker 1 has taken back the last four batches from worker 0, which then waits at the tail; it begins none of them
    and leaves."""
    runner.write("leaves.py", LEAVES)
    ended = runner.start("-m", "paceline", "run", "--pace", "async", "--workers", "2", "leaves.py").end()
    assert ended.code == 0, f"{ended.out}\n{ended.err}"
    assert "mine 5 weights [1.0]" in ended.out
