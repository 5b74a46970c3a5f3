"""The examples, small: what their first lines promise holds."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from tests.process.runner import ROOT, Ended, Runner

EXAMPLES = ROOT / "examples"


def said(ended: Ended, pattern: str) -> list[float]:
    """The numbers that the pattern's groups find in the script's output, all in one list."""
    assert ended.code == 0, ended.err
    return [float(number) for found in re.finditer(pattern, ended.out) for number in found.groups()]


LOSSES = r"Epoch (\d+): Loss (\S+)"
FINAL = r"(?:model parameters|squares solution): w = (\S+), b = (\S+)"


def descent(workers: int, epochs: int) -> tuple[list[float], list[float]]:
    """linear.py in formulas: each of n workers has 1/n of the points, and a step takes 1/n of each one's gradient."""
    torch.manual_seed(0)
    x = torch.randn(100, 1, dtype=torch.float64)
    y = 3 * x + 2 + 0.5 * torch.randn(100, 1, dtype=torch.float64)
    columns = torch.cat([x, torch.ones_like(x)], dim=1)
    model = torch.nn.Linear(1, 1, dtype=torch.float64)
    w = torch.tensor([[model.weight.item()], [model.bias.item()]], dtype=torch.float64)
    losses = []
    for _ in range(epochs):
        shares = zip(columns.chunk(workers), y.chunk(workers), strict=True)
        w = w - 0.1 * sum(2 / len(a) * a.T @ (a @ w - b) for a, b in shares) / workers
        losses.append((columns @ w - y).pow(2).mean().item())
    return losses, w.flatten().tolist()


def test_linear_on_five_workers_draws_the_curve_of_one_process(runner: Runner) -> None:
    alone = runner.python(str(EXAMPLES / "linear.py"), "--method", "batch")
    spread = runner.paceline("demo", "--json", "linear", "--method", "batch")

    assert said(spread, LOSSES) == pytest.approx(said(alone, LOSSES), abs=1e-6)
    assert said(spread, FINAL) == pytest.approx(said(alone, FINAL), abs=1e-6)
    losses, w = descent(workers=5, epochs=100)
    shown = [1, *range(10, 101, 10)]
    curve = [number for epoch in shown for number in (epoch, losses[epoch - 1])]
    assert said(spread, LOSSES) == pytest.approx(curve, abs=1e-6)
    assert said(spread, FINAL) == pytest.approx([*w, 3.008202, 1.967103], abs=1e-6)
    assert w == pytest.approx([3.008202, 1.967103], abs=1e-6)
    answer = spread.answer
    assert (answer["workers"], answer["steps"], answer["samples"]) == (5, 100, 100 * 100)
    assert (runner.folder / answer["run"] / "plots" / "linear.png").is_file()


def test_digits_are_told_apart_after_few_steps(runner: Runner) -> None:
    ended = runner.paceline("run", "--json", "--servers", "1", str(EXAMPLES / "digits.py"), "--steps", "300")
    (accuracy,) = said(ended, r"test accuracy: (\S+)")
    assert accuracy > 0.9
    assert ended.answer["steps"] >= 300
    assert said(ended, r"step (\d+): loss ") == [100, 200, 300]


def test_the_perceptron_ends_where_ddp_ends(runner: Runner) -> None:
    options = ("--epochs", "3", "--samples", "320", "--save")
    ours = runner.paceline("run", "--json", str(EXAMPLES / "mlp.py"), *options, "ours.safetensors")
    assert ours.code == 0, ours.err
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ddp = runner.python(*torchrun, str(EXAMPLES / "mlp_ddp.py"), *options, "ddp.safetensors")
    assert ddp.code == 0, ddp.err
    mine, theirs = (load_file(runner.folder / f"{name}.safetensors") for name in ("ours", "ddp"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-10)
    assert said(ours, r"epoch (\d+): loss (\S+)") == pytest.approx(said(ddp, r"epoch (\d+): loss (\S+)"), abs=1e-9)


@pytest.mark.long
def test_the_transformer_runs_on_very_little_text(runner: Runner) -> None:
    ended = runner.paceline("run", "--json", str(EXAMPLES / "text.py"), "--samples", "64")
    (loss,) = said(ended, r"held-out loss: (\S+) nats per byte")
    assert 1 < loss < 5.7
    assert (ended.answer["steps"], ended.answer["samples"]) == (2, 64)
    assert "\ndef " in ended.out


@pytest.mark.parametrize("pace", ["async", pytest.param("sync", marks=pytest.mark.long)])
def test_ratings_are_guessed_better_than_by_their_items_means(runner: Runner, pace: str) -> None:
    options = ("--pace", pace, "--assign", "round_robin")
    script = (str(EXAMPLES / "ratings.py"), "--epochs", "1")
    ended = runner.paceline("run", "--json", *options, *script)
    *_, last = said(ended, r"held-out RMSE (\S+)")
    (means,) = said(ended, r"each item's mean: RMSE (\S+)")
    assert last < means


@pytest.mark.long
def test_ratings_are_read_with_and_without_a_header(runner: Runner) -> None:
    lines = [f"{user}\t{item}\t{(user + item) % 5 + 1}\t881250949" for user in range(1, 31) for item in range(7, 27)]
    files = {"u.data": lines, "ml-100k.inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines]}
    told = []
    for name, text in files.items():
        (runner.folder / name).write_text("\n".join(text) + "\n")
        told.append(said(runner.python(str(EXAMPLES / "ratings.py"), "--data", name, "--epochs", "1"), r"RMSE (\S+)"))
    assert told[0] == told[1]
    assert len(told[0]) == 2
