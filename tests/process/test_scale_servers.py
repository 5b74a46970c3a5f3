"""Servers are added to jobs that are going on, and leave them, and are killed meanwhile: no update is lost, none counts
twice, and none is another."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest

from tests.process import kills
from tests.process.runner import Ended, Runner
from tests.process.standing import at, prepare

SAMPLES, EPOCHS, KILLS = 1200, 7, 6
LONG = pytest.mark.long

# Processes kill themselves and servers at random, but for worker 0, which stands still in three of its epochs.
SCRIPT = kills.SCRIPT.replace(
    "        draw_lots()\n",
    """\
        if run.rank:
            draw_lots()
        elif steps == 3 and epoch in (1, 3, 5):
            stand(epoch)
""",
).replace("from counting import job, mark\n", "from counting import job, mark\nfrom standing import stand\n")

SAME = """
import json
import sys

import torch
from standing import stand
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

run = paceline.init()
torch.manual_seed(1)
inputs = torch.randn(120, 8)
model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4, shuffle=True)
model, optimizer, loader = run.wrap(model, optimizer, loader)
for epoch in range(6):
    for step, (given, wanted) in enumerate(loader):
        optimizer.zero_grad()
        ((model(given) - wanted) ** 2).mean().backward()
        optimizer.step()
        if run.is_main and step == 3 and epoch in (1, 3, 5) and sys.argv[1:] == ["stands"]:
            stand(epoch)
if run.is_main:
    (run.directory / "numbers.json").write_text(json.dumps([p.tolist() for p in model.parameters()]))
"""


def scale(runner: Runner, servers: int) -> str:
    ended = runner.paceline("scale", "--servers", str(servers))
    assert ended.code == 0, ended.err
    return ended.out


def kill_server(runner: Runner, rank: int) -> None:
    """Its newest process, which may be about to end."""
    (path,) = (runner.folder / "runs").glob("*/run.json")
    processes = json.loads(path.read_text())["processes"]
    pid = [process["pid"] for process in processes if (process["role"], process["rank"]) == ("server", rank)][-1]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def of_servers(ended: Ended, kind: str) -> list[int]:
    return [event["rank"] for event in ended.events if (event.get("kind"), event.get("role")) == (kind, "server")]


@pytest.mark.parametrize(
    "options",
    [
        "--pace async",
        pytest.param("--pace sync", marks=LONG),
        pytest.param("--pace sync --assign lease", marks=LONG),
        pytest.param("--pace quorum:1", marks=LONG),
        pytest.param("--pace bounded:1", marks=LONG),
    ],
)
def test_with_one_server_then_three_then_one_each_sample_counts_once_an_epoch(options: str, runner: Runner) -> None:
    runner.write("counting.py", kills.COUNTING)
    prepare(runner)
    given = ["--workers", "2", "--servers", "1", "--max-servers", "3", "--restarts", "100", *options.split()]
    arguments = [str(SAMPLES), str(EPOCHS), str(KILLS), "0.03", "3"]
    running = runner.start_run(SCRIPT, *given, args=arguments)
    with at(runner, running, 1) as events:
        assert scale(runner, 3).splitlines()[0] == "3 servers instead of 1"
        events.until("server 1 steps its part")
        events.until("server 2 steps its part")
        kill_server(runner, 1)
    with at(runner, running, 3):
        scale(runner, 1)
        kill_server(runner, 2)
    with at(runner, running, 5) as events:
        events.until("server 1 has left")
        events.until("server 2 has left")
    ended = running.end()
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
    assert sorted(of_servers(ended, "join")) == sorted(of_servers(ended, "leave")) == [1, 2]
    assert 1 in of_servers(ended, "died")
    assert ended.answer["servers"] == 1
    assert "servers = 1\n" in (ended.directory / "config.toml").read_text()
    assert "3 servers instead of 1" in ended.err + ended.out


@pytest.mark.long
@pytest.mark.parametrize("pace", ["async", "sync"])
def test_the_launcher_may_die_of_a_wish_before_it_is_fulfilled(pace: str, runner: Runner) -> None:
    runner.write("counting.py", kills.COUNTING)
    prepare(runner)
    arguments = [str(SAMPLES), str(EPOCHS), "0", "0", "1"]
    running = runner.start_run(SCRIPT, "--pace", pace, "--servers", "1", "--max-servers", "3", args=arguments)
    with at(runner, running, 1) as events:
        scale(runner, 3)
        running.signal_launcher(signal.SIGKILL)
        events.until("server 1 steps its part")
        events.until("server 2 steps its part")
    with at(runner, running, 3):
        scale(runner, 1)
        running.signal_launcher(signal.SIGKILL)
    with at(runner, running, 5) as events:
        events.until("server 1 has left")
        events.until("server 2 has left")
    ended = running.end()
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * SAMPLES
    assert sorted(of_servers(ended, "join")) == sorted(of_servers(ended, "leave")) == [1, 2]
    assert not of_servers(ended, "died")
    roles = [event["role"] for event in ended.events if event.get("kind") == "died"]
    assert roles == ["launcher", "launcher"]


def test_at_sync_the_number_of_servers_changes_no_bit(runner: Runner) -> None:
    prepare(runner)
    given = ["--workers", "2", "--servers", "2"]
    whole = runner.run(SAME, *given)
    expected = (whole.directory / "numbers.json").read_text()
    (runner.folder / "runs").rename(runner.folder / "before")
    running = runner.start_run(SAME, *given, args=["stands"])
    with at(runner, running, 1) as events:
        scale(runner, 4)
        events.until("server 3 steps its part")
    with at(runner, running, 3):
        scale(runner, 1)
    with at(runner, running, 5) as events:
        events.until("server 1 has left")
    ended = running.end()
    assert ended.code == 0, ended.err
    assert (ended.directory / "numbers.json").read_text() == expected


@pytest.mark.long
@pytest.mark.parametrize("pace", ["async", "sync"])
def test_a_run_with_more_servers_is_resumed_with_as_many(pace: str, runner: Runner) -> None:
    runner.write("counting.py", kills.COUNTING)
    prepare(runner)
    arguments = [str(SAMPLES), "5", "0", "0", "1"]
    running = runner.start_run(SCRIPT, "--pace", pace, "--servers", "2", args=arguments)
    with at(runner, running, 1) as events:
        scale(runner, 3)
        events.until("server 2 steps its part")
    with at(runner, running, 3):
        running.signal(signal.SIGINT)
    first = running.end()
    assert first.code == 130, first.err
    ended = runner.paceline("resume", "--json", str(first.directory))
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [5] * SAMPLES
    assert ended.answer["servers"] == 3
