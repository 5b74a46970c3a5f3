"""Starting workers from Python: ``launch`` as users of mp.spawn expect it, ``Trainer`` and ``fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline.errors import ScriptError, UsageError
from paceline.events import Output, Started, Summary
from tests.process.runner import Runner, await_death, open_pids

SPAWNING = """
import threading
from dataclasses import dataclass

import torch

import paceline

print("the main module is", __name__)


@dataclass
class Sizes:
    samples: int
    batch: int


def train(rank, sizes, start):
    run = paceline.init()
    assert (rank, 3) == (run.rank, run.num_workers)
    print(f"worker {rank} got {sizes} and {start.tolist()}")
    weight = torch.nn.Parameter(start)
    loader = torch.utils.data.DataLoader(torch.arange(float(sizes.samples)), sizes.batch)
    optimizer, loader = run.wrap(torch.optim.SGD([weight], lr=0.25), loader)
    for x in loader:
        optimizer.zero_grad()
        (weight * x.mean()).sum().backward()
        optimizer.step()
        run.log(loss=weight.detach().sum())
    print(f"worker {rank} ends at {weight.tolist()}")


def start():
    torch.nn.Parameter(torch.ones(2)).sum().backward()  # this process has used torch, as notebooks have
    tell(paceline.launch(train, (Sizes(12, 2), torch.ones(2)), workers=3, name="spawned"))


def tell(summary):
    print(summary.status, summary.steps, summary.samples, summary.workers, summary.run)


if __name__ == "__main__":
    start()
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
"""


def test_launch_runs_a_function_in_every_worker_as_spawn_does(runner: Runner) -> None:
    ended = runner.python(str(runner.write("main.py", SPAWNING)))
    assert ended.code == 0, ended.err
    assert ended.err == ""

    folders = sorted((runner.folder / "runs").iterdir())
    assert len(folders) == 2
    # Two rounds: the means of 0..5 and of 6..11, each times the rate, are subtracted from 1.
    end = 1 - 0.25 * (2.5 + 8.5)
    mine = ["the main module is __mp_main__", "worker 0 got Sizes(samples=12, batch=2) and [1.0, 1.0]"]
    mine.append(f"worker 0 ends at [{end}, {end}]")
    told = [f"done 2 12 3 {folder.relative_to(runner.folder)}" for folder in folders]
    assert ended.out.splitlines() == ["the main module is __main__", *mine, told[0], *mine, told[1]]
    log = (folders[0] / "logs" / "worker-2.log").read_text()
    assert log == "\n".join(mine).replace("worker 0", "worker 2") + "\n"


def fail_on_one(rank: int, wanted: int) -> None:
    print(f"worker {rank} begins")
    if rank == wanted:
        raise ZeroDivisionError(f"of worker {rank}")
    paceline.init().wrap(optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


@pytest.mark.parametrize("servers", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_exception_in_a_worker_comes_out_of_launch(servers: int, tmp_path: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(ScriptError, match="worker 1 raised ZeroDivisionError: of worker 1") as caught:
        paceline.launch(fail_on_one, (1,), workers=2, servers=servers, runs=tmp_path, watch=seen.append)
    (note,) = caught.value.__notes__
    assert note.startswith("in the worker:\nTraceback (most recent call last):\n")
    assert note.endswith("ZeroDivisionError: of worker 1\n")
    assert "paceline/engine" not in note
    assert "test_launch.py" in note.splitlines()[2]

    started, summary = seen[0], seen[-1]
    assert isinstance(started, Started)
    assert isinstance(summary, Summary)
    assert (summary.status, summary.exit_code) == ("failed", 1)
    assert "".join(record.text for record in seen if isinstance(record, Output)) == "worker 0 begins\n"
    others = (process.pid for process in started.processes if process.role != "front")
    await_death(open_pids(others))


def test_launch_refuses_what_cannot_be_called(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be called as fail_on_one") as caught:
        paceline.launch(fail_on_one, (1, 2), runs=tmp_path)
    assert "rank" in caught.value.fix
    with pytest.raises(UsageError, match="workers is 0; it must be 1 or more"):
        paceline.launch(fail_on_one, (1,), workers=0, runs=tmp_path)
    assert not list(tmp_path.iterdir())


def make() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 4)).double()
    x = torch.randn(44, 6, dtype=torch.float64)
    return model, TensorDataset(x, x[:, :4].argmax(1))


def train_alone(model: nn.Module, data: TensorDataset, batch: int, epochs: int) -> list[float]:
    """The oracle: plain SGD, cross entropy; the loss of every step."""
    optimizer = optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=batch):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("servers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_trainer_trains_the_given_model_as_one_process_would(servers: int, tmp_path: Path) -> None:
    model, data = make()
    oracle, _ = make()
    losses = train_alone(oracle, data, batch=2 * 5, epochs=2)

    trainer = paceline.Trainer(
        model,
        DataLoader(data, batch_size=5),
        workers=2,
        servers=servers,
        epochs=2,
        optimizer=optim.SGD(model.parameters(), lr=0.3),
        runs=tmp_path,
    )
    trained = trainer.train()

    assert trained.model is model
    for mine, its in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
    assert [row["step"] for row in trained.history] == [*range(1, 11)]
    assert [row["loss"] for row in trained.history] == pytest.approx(losses, rel=1e-10)
    assert trained.directory.parent == tmp_path
    assert (trained.directory / "summary.json").is_file()
    assert trained.summary.status == "done"
    assert (trained.summary.samples, trained.summary.epochs) == (2 * 44, 2)


def test_fit_takes_tensors_and_stop_rules(tmp_path: Path) -> None:
    model, data = make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trained = paceline.fit(model, data.tensors, workers=2, epochs=50, batch_size=8, steps=7, runs=tmp_path)
    assert trained.model is model
    assert len(trained.history) == trained.summary.steps == 7
    assert trained.summary.reason == "7 steps done"
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
