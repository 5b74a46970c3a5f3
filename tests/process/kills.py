"""A job whose parameters count how often each sample was trained on, and whose processes kill themselves at random.

What it is worth: whoever dies, whenever, every sample counts exactly once an epoch. Run for long by ``make soak``.
"""

from __future__ import annotations

from tests.process.runner import Ended, Runner

# Where servers can import it.
COUNTING = """
import torch
from torch.utils.data import DataLoader, TensorDataset


class Counting(torch.optim.Optimizer):
    '''Adds one wherever the gradient is not zero, whatever it was divided by.'''

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_((parameter.grad != 0).to(parameter.dtype))


def job(samples, **options):
    '''Parameters that count, their optimizer, and a loader of the samples' numbers.'''
    counts = torch.nn.Parameter(torch.zeros(samples, dtype=torch.float64))
    loader = DataLoader(TensorDataset(torch.arange(samples)), batch_size=4, **options)
    return counts, Counting([counts]), loader


def mark(counts, numbers):
    '''The gradient of a batch.'''
    counts.grad = torch.zeros_like(counts)
    counts.grad[numbers] = 1.0
"""

# Worker 0 writes how often each sample was counted. A process dies up to two milliseconds after it drew its lot: in its
# step, under the lock, in its loader, or where it waits.
SCRIPT = """
import json
import os
import random
import signal
import subprocess
import sys
import threading

from counting import job, mark

import paceline

samples, epochs, kills = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance, seed, launchers, wishes = float(sys.argv[4]), sys.argv[5], "launchers" in sys.argv, "wishes" in sys.argv
luck = random.Random(f"{seed} {os.getpid()}")


def take_one():
    for number in range(kills):
        try:
            os.close(os.open(run.directory / f"kill-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number + 1
    return 0


def other(*roles):
    # The pid of one of these, if there is any; the last of each role and rank.
    processes = json.loads((run.directory / "run.json").read_text())["processes"]
    pids = {(p["role"], p["rank"]): p["pid"] for p in processes if p["role"] in roles}
    return luck.choice(list(pids.values())) if pids else None


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # another has been faster


def wish():
    # For another number of servers; worker 0 does not wait for the answer.
    servers = str(luck.randint(1, 4))
    command = [sys.executable, "-m", "paceline", "scale", str(run.directory), "--servers", servers]
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def draw_lots():
    if wishes and run.rank == 0 and luck.random() < 0.01:
        wish()
    if luck.random() < chance and (lot := take_one()):
        victim = None
        if launchers and lot == 1:
            victim = other("launcher")
        elif luck.random() < 0.5:
            victim = other("server", "launcher") if launchers else other("server")
        timer = threading.Timer(luck.random() * 0.002, kill, (victim or os.getpid(),))
        timer.daemon = True
        timer.start()


run = paceline.init()
counts, optimizer, loader = job(samples, shuffle=True)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(epochs):
    steps = 0
    for (numbers,) in loader:
        mark(counts, numbers)
        draw_lots()
        optimizer.step()
        run.log(steps=steps)  # no loss, of which a picture would be drawn
        steps += 1
    assert steps, "a loop must not find an epoch empty"
if run.is_main:
    (run.directory / "counts.json").write_text(json.dumps(counts.detach().tolist()))
"""


def run(
    runner: Runner,
    *options: str,
    samples: int,
    epochs: int,
    kills: int,
    chance: float,
    seed: int,
    launchers: bool = False,
    wishes: bool = False,
) -> Ended:
    """``launchers``: they die too; ``wishes``: servers come and leave all the time, up to four."""
    runner.write("counting.py", COUNTING)
    arguments = [str(samples), str(epochs), str(kills), str(chance), str(seed)]
    arguments += ["launchers"] * launchers + ["wishes"] * wishes
    return runner.run(SCRIPT, "--restarts", "1000", *options, args=arguments)
