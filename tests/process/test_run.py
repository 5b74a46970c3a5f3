"""What `paceline run` leaves and says, and that its numbers are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.process.runner import Ended, Runner

SAMPLES, BATCH, EPOCHS = 50, 4, 2

TRAIN = f"""
import argparse
import json
import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--batch", type=int, default={BATCH})
parser.add_argument("--passes", type=int, default={EPOCHS})
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--shuffle", action="store_true")
args, _ = parser.parse_known_args()

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn({SAMPLES}, 7)
y = torch.tanh(x @ torch.randn(7, 3))
model = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
loader = DataLoader(TensorDataset(torch.arange({SAMPLES}), x, y), args.batch, shuffle=args.shuffle)

run = paceline.init()
print("arguments", json.dumps(sys.argv))
model, optimizer, loader = run.wrap(model, optimizer, loader)
for _ in range(args.passes):
    for numbers, inputs, targets in loader:
        loss = (model(inputs) - targets).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss, double=2 * loss)
        print("batch", json.dumps([loss.item(), numbers.tolist()]))
print("steps", run.step)
if run.is_main:
    save_file(model.state_dict(), run.directory / "model.safetensors")
print(f"worker {{run.rank}} of {{run.num_workers}} has come to its end")
"""


def said(text: str, word: str) -> list[Any]:
    """What the script printed after ``word``, each a JSON value."""
    return [json.loads(line.partition(" ")[2]) for line in text.splitlines() if line.startswith(f"{word} ")]


def parameters(directory: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(directory / "model.safetensors").values()])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ended]:
    """The script as one process without a launcher, with this batch size; each only once."""

    @cache
    def train(batch: int) -> Ended:
        runner = Runner(tmp_path_factory.mktemp("alone"))
        ended = runner.python(str(runner.write("train.py", TRAIN)), "--batch", str(batch))
        assert ended.code == 0, ended.err
        return ended

    return train


@pytest.mark.parametrize(
    ("workers", "servers"),
    [(3, 1), *(pytest.param(*shape, marks=pytest.mark.long) for shape in [(1, 0), (1, 1), (2, 0), (2, 2), (3, 0)])],
)
def test_n_workers_train_as_one_process_on_the_whole_batch(
    workers: int, servers: int, runner: Runner, alone: Callable[[int], Ended]
) -> None:
    ended = runner.run(TRAIN, "--workers", str(workers), "--servers", str(servers))
    assert ended.code == 0, ended.err
    oracle = alone(BATCH * workers)

    torch.testing.assert_close(parameters(ended.directory), parameters(oracle.directory), rtol=0, atol=1e-10)
    losses = [loss for loss, _ in said(oracle.out, "batch")]
    rounds = -(-SAMPLES // (BATCH * workers)) * EPOCHS
    assert [metric["step"] for metric in ended.metrics] == [*range(1, rounds + 1)]
    assert [metric["loss"] for metric in ended.metrics] == pytest.approx(losses, rel=1e-10)
    assert sum(metric["samples"] for metric in ended.metrics) == SAMPLES * EPOCHS
    assert ended.answer["workers"] == workers
    assert ended.answer["servers"] == servers
    roles = [(process["role"], process["rank"]) for process in ended.info["processes"]]
    wanted = [
        ("front", 0),
        ("launcher", 0),
        *(("server", k) for k in range(servers)),
        *(("worker", w) for w in range(workers)),
    ]
    assert sorted(roles) == sorted(wanted)


def test_a_run_tells_all_of_itself_and_its_config_runs_again(runner: Runner) -> None:
    own = ["--shuffle", "--workers", "9", "--steps=1", "--json", "--", "a b", "", "-h", "--seed"]
    runner.write("train.py", TRAIN)
    first = runner.run("train.py", "--seed", "7", "--workers", "2", args=own)
    assert first.code == 0, first.err

    rounds = -(-SAMPLES // (BATCH * 2)) * EPOCHS
    answer = first.answer
    assert answer["status"] == "done"
    assert answer["pace"] == "sync"
    assert (answer["workers"], answer["servers"]) == (2, 0)
    assert (answer["steps"], answer["samples"], answer["epochs"]) == (rounds, SAMPLES * EPOCHS, EPOCHS)
    assert answer["seconds"] > 0
    assert answer["samples_per_s"] == pytest.approx(answer["samples"] / answer["seconds"], rel=1e-3)
    assert 0 <= answer["waiting"] <= 1
    assert answer["bytes_sent"] == 0
    assert answer["loss"] == first.metrics[-1]["loss"]
    assert runner.folder / answer["run"] == first.directory
    assert (runner.folder / answer["plot"]).is_file()

    # The script's own output stands before the answer, worker 0's alone; the other's is in its log.
    assert said(first.out, "arguments") == [["train.py", *own]]
    assert "worker 0 of 2 has come to its end" in first.out.splitlines()[:-1]
    assert "worker 1 of 2" not in first.out
    assert "worker 1 of 2 has come to its end" in first.log(1)
    assert said(first.log(1), "arguments") == [["train.py", *own]]
    assert "\n".join([*first.log(0).splitlines(), first.out.splitlines()[-1]]) == first.out.rstrip("\n")

    info = first.info
    assert (info["status"], info["exit_code"], info["seed"], info["pace"]) == ("done", 0, 7, "sync")
    assert info["argv"][-len(own) :] == own
    pids = [process["pid"] for process in info["processes"]]
    assert len(set(pids)) == 4
    assert all(set(process) == {"role", "rank", "pid", "host"} for process in info["processes"])
    assert len({process["host"] for process in info["processes"]}) == 1

    # Worker 0's other values are kept; every sample is used once a pass.
    batches = [said(first.out, "batch"), said(first.log(1), "batch")]
    assert [metric["step"] for metric in first.metrics] == [*range(1, rounds + 1)]
    assert [metric["values"] for metric in first.metrics] == [{"double": 2 * loss} for loss, _ in batches[0]]
    assert [len(own_batches) for own_batches in batches] == [rounds, rounds - EPOCHS]
    drawn = sorted(number for own_batches in batches for _, numbers in own_batches for number in numbers)
    assert drawn == sorted([*range(SAMPLES)] * EPOCHS)

    kinds = [event.get("kind", event["type"]) for event in first.events]
    assert kinds == ["wrapped", *["epoch"] * EPOCHS, "leave", "leave"]
    assert {key: first.summary[key] for key in ("status", "steps", "loss")} == {
        key: answer[key] for key in ("status", "steps", "loss")
    }

    again = runner.paceline("run", "--json", "--config", str(first.directory / "config.toml"))
    assert again.code == 0, again.err
    assert again.directory != first.directory
    assert said(again.out, "arguments") == [["train.py", *own]]
    assert said(again.out, "batch") == batches[0]
    assert said(again.log(1), "batch") == batches[1]
    assert torch.equal(parameters(again.directory), parameters(first.directory))


LONG = pytest.mark.long
STOPS = {
    "steps": (["--steps", "9"], [], "9 steps done"),
    "epochs": (["--epochs", "3"], [], "3 epochs done"),
    "loss": (["--until-loss", "0.25"], [], "reached 0.25"),
    "patience": (["--patience", "2"], ["--lr", "0"], "no better loss"),
}


@pytest.mark.parametrize("kind", ["patience", *(pytest.param(k, marks=LONG) for k in ("steps", "epochs", "loss"))])
def test_a_stop_rule_ends_all_workers_in_the_same_round(kind: str, runner: Runner) -> None:
    options, own, reason = STOPS[kind]
    ended = runner.run(TRAIN, "--workers", "3", *options, args=["--passes", "40", *own])
    assert ended.code == 0, ended.err

    steps = ended.answer["steps"]
    assert reason in ended.answer["reason"]
    assert said(ended.out, "steps") == said(ended.log(1), "steps") == said(ended.log(2), "steps") == [steps]
    assert [metric["step"] for metric in ended.metrics] == [*range(1, steps + 1)]
    rounds = -(-SAMPLES // (3 * BATCH))
    looks = [_mean(ended, epoch) for epoch in range(1, steps // rounds + 1)]
    match kind:
        case "steps":
            assert steps == 9
        case "epochs":
            assert steps == 3 * rounds
        case "loss":
            assert steps == rounds * next(number for number, loss in enumerate(looks, 1) if loss <= 0.25)
            assert 1 < len(looks) < 40
        case "patience":
            assert looks == pytest.approx(looks[:1] * 3, rel=1e-12)
            assert steps == rounds * 3


ORDINARY = """
import atexit
import multiprocessing
import os
import subprocess
import sys
import threading

import torch
from torch.utils.data import DataLoader

import paceline

run = paceline.init()
atexit.register(print, "at exit")
weight = torch.nn.Parameter(torch.zeros(1))
optimizer, loader = run.wrap(torch.optim.SGD([weight], lr=0.1), DataLoader(torch.arange(40.0), batch_size=4))
for number, x in enumerate(loader):
    optimizer.zero_grad()
    (weight * x.mean()).sum().backward()
    optimizer.step()
    if run.rank == 1 and number == 2:
        sys.exit()
print(subprocess.run(["echo", "subprocess"], capture_output=True, text=True).stdout, end="")
with multiprocessing.Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
child = os.fork()
if child == 0:
    os._exit(3)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def outlive():
    threading.main_thread().join()
    print("thread")


threading.Thread(target=outlive).start()
print("x" * 1_000_000)
atexit.register(lambda: (sys.stdout.buffer.write(b"\\xff no end of line"), sys.stdout.flush()))
"""


def test_a_script_may_do_what_scripts_do_and_leave_early(runner: Runner) -> None:
    ended = runner.run(ORDINARY)
    assert ended.code == 0, ended.err
    expected = ["subprocess", "[1, 2]", "child 3", "x" * 1_000_000, "thread", "\ufffd no end of lineat exit"]
    assert ended.out.splitlines()[:-1] == expected
    assert ended.log(1) == "at exit\n"
    # Worker 1 has left after three batches; worker 0 had its five all the same.
    assert [metric["samples"] for metric in ended.metrics] == [8, 8, 8, 4, 4]
    assert ended.answer["status"] == "done"


def _mean(ended: Ended, epoch: int) -> float:
    """The loss by samples over one pass."""
    metrics = [metric for metric in ended.metrics if metric["epoch"] == epoch]
    return float(sum(m["loss"] * m["samples"] for m in metrics) / sum(m["samples"] for m in metrics))


BEHIND = """
import torch
import paceline
from torch.utils.data import DataLoader, TensorDataset

run = paceline.init()
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], 1.0)
data, test = (TensorDataset(torch.arange(float(count))) for count in (10, 5))
optimizer, loader, tests = run.wrap(optimizer, DataLoader(data, 3), DataLoader(test, 3))
for epoch in range(3):
    for (batch,) in loader:
        optimizer.zero_grad()
        (weight * batch).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for (batch,) in tests:
            run.log(loss=-1)  # of an evaluation: not training's
    run.log(loss=10 * epoch + run.rank, accuracy=epoch + run.rank / 2)
"""


@pytest.mark.parametrize(
    ("options", "last"),
    [((), 3), pytest.param(("--epochs", "2"), 2, marks=pytest.mark.long), (("--pace", "async"), 3)],
)
def test_what_is_logged_behind_an_epoch_is_the_epochs_and_the_last_is_the_runs(
    options: tuple[str, ...], last: int, runner: Runner
) -> None:
    ended = runner.run(BEHIND, "--workers", "2", *options)
    assert ended.code == 0, ended.err
    behind = [metric for metric in ended.metrics if not metric["samples"]]
    assert [metric["epoch"] for metric in behind] == [*range(1, last + 1)]
    assert [metric["step"] for metric in behind] == [2 * epoch for epoch in range(1, last + 1)]
    assert [metric["values"] for metric in behind] == [{"accuracy": float(epoch)} for epoch in range(last)]
    if not options:  # worker 1 has the last batches, of three samples and of one
        assert [metric["loss"] for metric in behind] == pytest.approx([10 * epoch + 0.4 for epoch in range(last)])
    assert all(metric["loss"] is None for metric in ended.metrics if metric["samples"])
    assert 10 * (last - 1) <= ended.summary["loss"] <= 10 * (last - 1) + 1
    assert ended.summary["values"] == {"accuracy": last - 1.0}
    assert sum(metric["samples"] for metric in ended.metrics) == ended.summary["samples"] == 10 * last


NAMES = """
from pathlib import Path

import paceline

run = paceline.init()
run.barrier()
of = [int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:2]]
for process in ["self", *map(str, of)]:
    name, line = (Path("/proc", process, file).read_bytes() for file in ("comm", "cmdline"))
    print("name", name.decode().strip(), line.rstrip(b"\\0").split(b"\\0"))
"""


def test_processes_are_called_by_what_they_are(runner: Runner) -> None:
    ended = runner.run(NAMES, "--workers", "2")
    assert ended.code == 0, ended.err
    for rank in (0, 1):
        mine, zygote = (ended.directory / "logs" / f"worker-{rank}.log").read_text().splitlines()
        assert mine == f"name paceline:w{rank} [b'paceline:w{rank}', b'train.py']"
        assert zygote == "name paceline:zygote [b'paceline:zygote']"
