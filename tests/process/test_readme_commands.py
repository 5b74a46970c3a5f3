"""Every command that the README tells people to type works: each is run here, with less to do."""

from __future__ import annotations

import shlex

import pytest

from tests import readme
from tests.process.runner import Runner

README = readme.ENGLISH.read_text(encoding="utf-8")

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
    "paceline run --workers 2 examples/mlp.py --save ours.safetensors": "--epochs 2",
    "torchrun --nproc-per-node 2 examples/mlp_ddp.py --save ddp.safetensors": "--epochs 2",
    "torchrun --nproc-per-node 2 examples/mlp.py": "--epochs 2",
    "paceline demo text": "--samples 64",
    "paceline run --workers 4 --assign hash examples/linear.py --method minibatch": "--epochs 2",
    "paceline run --until-loss 0.26 examples/linear.py": "--epochs 20",
    "paceline run --patience 5 examples/digits.py": "--steps 200",
    "paceline run --workers 3 --pace quorum:2 examples/digits.py": "--steps 20",
    "paceline run --workers 2 --pace bounded:4 examples/readings.py": "",
    "paceline run --workers 2 --servers 1 --pace async examples/digits.py": "--steps 20",
    "paceline run --workers 3 --pace async --staleness-damping examples/digits.py": "--steps 20",
    "paceline run --workers 2 --pace async:8 examples/digits.py": "--steps 20",
    "paceline run --workers 2 --pace local:16 examples/digits.py": "--steps 20",
    "paceline run --workers 2 --pace local:16:nesterov examples/mlp.py": "--epochs 2",
    "paceline run --workers 2 --servers 2 examples/push_pull.py": "",
    "paceline run --workers 2 --pace async examples/ratings.py": "--epochs 1",
    "paceline run --workers 3 --assign lease examples/digits.py": "--steps 20",
    "paceline run --workers 2 --data served examples/digits.py": "--steps 20",
    "paceline run --workers 3 --servers 2 counts.py": "",
    "python spread.py": "",
    "python fit.py": "",
    "paceline export slurm --nodes 2 --workers 8 --pace bounded:4 train.py": "",
    "paceline export k8s --image registry/train:1 --nodes 2 --workers 8 train.py": "",
    "paceline export k8s --image registry/train:1 --kind rayjob --workers 4 train.py": "",
    "paceline runs list": "",
    "paceline doctor": "",
    "paceline run --workers 4 --servers 2 --dry-run train.py": "",
}
# Other tests show the same in `make test`; `make long` runs these too.
LONG = {
    "paceline demo linear",
    "paceline demo digits",
    "paceline run --workers 2 --servers 1 examples/digits.py",
    "paceline run --until-loss 0.26 examples/linear.py",
    "paceline run --workers 2 --pace async examples/ratings.py",
    "torchrun --nproc-per-node 2 examples/mlp.py",
    "paceline run --workers 3 --pace quorum:2 examples/digits.py",
    "paceline run --workers 2 --pace local:16:nesterov examples/mlp.py",
    "paceline run --workers 2 --servers 2 examples/mlp.py",
    "paceline run --workers 5 examples/linear.py --method sgd",
    "paceline run --workers 4 examples/mlp.py",
    "paceline run --pace sync examples/digits.py",
    "paceline run --workers 3 examples/linear.py",
    "paceline run --workers 2 examples/mlp.py --save ours.safetensors",
    "torchrun --nproc-per-node 2 examples/mlp_ddp.py --save ddp.safetensors",
    "paceline demo text",
    "paceline run --workers 4 --assign hash examples/linear.py --method minibatch",
    "paceline run --patience 5 examples/digits.py",
    "paceline run --workers 2 --servers 1 --pace async examples/digits.py",
    "paceline run --workers 3 --pace async --staleness-damping examples/digits.py",
    "paceline run --workers 2 --pace async:8 examples/digits.py",
    "paceline run --workers 2 --pace local:16 examples/digits.py",
    "paceline run --workers 3 --assign lease examples/digits.py",
    "paceline run --workers 2 --data served examples/digits.py",
    "python fit.py",
}
PROGRAMS = {"paceline": ["-m", "paceline"], "python": [], "torchrun": ["-m", "torch.distributed.run"]}

# Two such tests at once must not want one port, and a host's own name need not lead anywhere.
TORCHRUN = {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def test_no_command_is_forgotten() -> None:
    assert set(readme.commands(README)) == LESS.keys()


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=pytest.mark.long) if command in LONG else command for command in LESS]
)
def test_command_works(command: str, runner: Runner) -> None:
    for name, code in readme.files(README).items():
        runner.write(name, code)
    (runner.folder / "examples").symlink_to(readme.ROOT / "examples")
    program, *arguments = shlex.split(f"{command} {LESS[command]}")
    variables = TORCHRUN if program == "torchrun" else {}
    ended = runner.start(*PROGRAMS[program], *arguments, **variables).end()
    assert ended.code == 0, f"{ended.out}\n{ended.err}"
    assert ended.out.strip()
