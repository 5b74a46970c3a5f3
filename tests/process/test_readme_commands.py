"""Every command that the README tells people to type works: each is run here, with less to do."""

from __future__ import annotations

import shlex

import pytest
import torch
from safetensors.torch import load_file

from tests import readme
from tests.process.runner import Ended, Runner

README = readme.ENGLISH.read_text(encoding="utf-8")
OURS = "paceline run --workers 2 examples/mlp.py --save ours.safetensors"
THEIRS = "torchrun --nproc-per-node 2 examples/mlp_ddp.py --save ddp.safetensors"

# What is appended to each command, so that it has less to do. A command that is not here fails the first test.
LESS: dict[str, str] = {
    "python train.py": "",
    "paceline run --workers 4 train.py": "",
    "paceline demo linear": "--epochs 2",
    "paceline run --workers 5 examples/linear.py --method sgd": "--epochs 2",
    "paceline demo digits": "--steps 20",
    "paceline run --workers 2 --servers 1 examples/digits.py": "--steps 20",
    "paceline run --workers 2 --servers 2 examples/mlp.py": "--epochs 2",
    "paceline run --workers 4 examples/mlp.py": "--epochs 2",
    "paceline run --pace sync examples/digits.py": "--steps 20",
    "paceline run --workers 3 examples/linear.py": "--epochs 2",
    OURS: "--epochs 2",
    THEIRS: "--epochs 2",
    "paceline demo text": "--samples 64",
    "paceline run --workers 4 --assign hash examples/linear.py --method minibatch": "--epochs 2",
    "paceline run --until-loss 0.26 examples/linear.py": "--epochs 20",
    "paceline run --patience 5 examples/digits.py": "--steps 200",
    "python spread.py": "",
    "python fit.py": "",
    "paceline runs list": "",
    "paceline run --workers 4 --servers 2 --dry-run train.py": "",
}
PROGRAMS = {"paceline": ["-m", "paceline"], "python": [], "torchrun": ["-m", "torch.distributed.run"]}

# Two such tests at once must not want one port, and a host's own name need not lead anywhere.
TORCHRUN = {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def run(runner: Runner, command: str) -> Ended:
    """Type ``command``, with less to do, in a folder that has the README's files and the examples."""
    for name, code in readme.files(README).items():
        runner.write(name, code)
    examples = runner.folder / "examples"
    if not examples.exists():
        examples.symlink_to(readme.ROOT / "examples")
    program, *arguments = shlex.split(f"{command} {LESS[command]}")
    ended = runner.start(*PROGRAMS[program], *arguments, **(TORCHRUN if program == "torchrun" else {})).end()
    assert ended.code == 0, f"{command}\n{ended.out}\n{ended.err}"
    return ended


def test_no_command_is_forgotten() -> None:
    assert set(readme.commands(README)) == LESS.keys()


@pytest.mark.parametrize("command", [command for command in LESS if command not in (OURS, THEIRS)])
def test_command_works(command: str, runner: Runner) -> None:
    ended = run(runner, command)
    assert ended.out.strip()


def test_mlp_ends_at_the_parameters_that_ddp_ends_at(runner: Runner) -> None:
    run(runner, OURS)
    run(runner, THEIRS)
    ours, theirs = (load_file(runner.folder / f"{name}.safetensors") for name in ("ours", "ddp"))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, theirs[name], rtol=0, atol=1e-13, msg=name)
