"""`python train.py` with the three lines in it is `python train.py` without them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.process.runner import Runner

# The lines that a user adds end in "# added".
SCRIPT = """
import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline  # added

torch.manual_seed(5)
data = TensorDataset(torch.randn(60, 8), torch.randint(3, (60,)))
model = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Dropout(0.3), nn.Linear(20, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4)
loader = DataLoader(data, batch_size=7, shuffle=True)
given = (model, optimizer, scheduler, loader)
run = paceline.init()  # added
assert paceline.init() is run  # added
model, optimizer, scheduler, loader = run.wrap(model, optimizer, scheduler, loader)  # added
assert (model, optimizer, scheduler, loader) == given
assert run.wrap(model) is model  # added
for _ in range(3):
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        run.log(loss=loss, rate=scheduler.get_last_lr()[0])  # added
save_file({**model.state_dict(), "drawn": torch.rand(4)}, sys.argv[1])
"""

# What only Linux has, and paceline must not ask for until processes are to be started.
ELSEWHERE = """
import os
import sys

import torch

torch.optim.SGD([torch.zeros(1)])  # imports the rest of torch, which must know the true platform
sys.platform = "darwin"
for name in ("memfd_create", "pidfd_open", "posix_fallocate", "sched_getaffinity", "eventfd", "pipe2"):
    if hasattr(os, name):
        delattr(os, name)
sys.modules["fcntl"] = None
"""

LOOKING = """
from pathlib import Path

assert "paceline.engine.launcher.front" not in sys.modules
assert not Path("runs").exists()
assert (run.rank, run.num_workers, run.is_main, run.step, str(run.pace)) == (0, 1, True, 0, "sync")
assert run.directory == run.directory
assert (run.directory / "plots").is_dir()
assert [run.directory] == list(Path("runs").iterdir())
try:
    paceline.launch(len)
except paceline.PacelineError as error:
    print(error)
"""


def test_the_three_lines_change_no_bit_of_a_script_that_runs_alone(runner: Runner) -> None:
    plain = [line for line in SCRIPT.splitlines() if not line.endswith("# added")]
    ended = runner.python(str(runner.write("plain.py", "\n".join(plain))), "plain.safetensors")
    assert ended.code == 0, ended.err
    ended = runner.python(str(runner.write("three.py", SCRIPT)), "three.safetensors")
    assert ended.code == 0, ended.err
    assert ended.out + ended.err == ""

    with_lines, without = (load_file(runner.folder / f"{name}.safetensors") for name in ("three", "plain"))
    assert with_lines.keys() == without.keys()
    assert all(torch.equal(with_lines[name], without[name]) for name in without)
    assert not (runner.folder / "runs").exists()


def test_a_script_alone_needs_no_linux_and_makes_a_directory_only_when_asked(runner: Runner) -> None:
    ended = runner.python(str(runner.write("train.py", ELSEWHERE + SCRIPT + LOOKING)), "ours.safetensors")
    assert ended.code == 0, ended.err
    assert "distributed runs need Linux; this is darwin" in ended.out


def test_half_an_environment_of_other_launchers_is_refused_and_not_misread(runner: Runner) -> None:
    script = runner.write("train.py", "import paceline\n\npaceline.init()\n")
    ended = runner.python(str(script), WORLD_SIZE="2", RANK="1")
    assert ended.code == 1
    assert "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set" in ended.err
