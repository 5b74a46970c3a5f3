"""Any process of a run may be killed at any moment: another takes a worker's place and training goes on, or the run
ends with a sentence; and nobody is left behind."""

from __future__ import annotations

import re
import signal

import pytest

from tests.process.runner import Ended, Runner, await_death, open_pids

# Dies in a state that is told on its command line. Worker 1 has fewer batches than worker 0 in every pass.
DYING = """
import ctypes
import json
import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

state, victims, once = sys.argv[1], sys.argv[2].split(","), sys.argv[3:] == ["once"]


def first_time():
    # Nobody has died of this yet, or all are to.
    if once:
        try:
            os.close(os.open(f"died-{rank}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    return True


def kill(pid):
    if first_time():
        os.kill(pid, signal.SIGKILL)


def die():
    kill(os.getpid())


def pid_of(role, rank):
    # Known once all processes exist; that was long ago or will be at once.
    while True:
        info = json.loads((run.directory / "run.json").read_text())
        if info["status"] == "running":
            return next(p["pid"] for p in info["processes"] if (p["role"], p["rank"]) == (role, rank))


rank = paceline.engine.context.current.rank  # there is no run to ask yet
mine = str(rank) in victims
if mine and state == "before init":
    die()
run = paceline.init()
model = nn.Sequential(nn.Linear(5, 30), nn.Linear(30, 1))
optimizer = torch.optim.AdamW(model.parameters())
loader = DataLoader(TensorDataset(torch.randn(52, 5), torch.randn(52, 1)), batch_size=4)
if mine and state == "before wrap":
    die()
if state == "waiting in wrap" and run.is_main:
    kill(pid_of("worker", 1))
model, optimizer = run.wrap(model, optimizer)
if mine and state == "between wraps":
    die()
loader = run.wrap(loader)
if mine and state == "in backward":
    model[1].weight.register_hook(lambda gradient: die() if run.step == 3 else None)
if mine and state == "in a step's hook":
    optimizer.register_step_post_hook(lambda *_: die() if run.step == 3 else None)
print("training", flush=True)
for epoch in range(1_000_000 if state == "until killed" else 2):
    for batch, (x, y) in enumerate(loader):
        loss = (model(x) - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        if epoch == 1 and batch == 2:
            match state:
                case "in a pass" if mine:
                    die()
                case "segfault" if mine:
                    ctypes.string_at(0)
                case "exit" if mine:
                    os._exit(3)
                case "others stuck" if mine:
                    die()
                case "others stuck":
                    print("stuck", flush=True)
                    while True:
                        pass
                case "server" if run.is_main:
                    kill(pid_of("server", 1))
                case "zygote" if run.is_main:
                    os.kill(os.getppid(), signal.SIGKILL)
        if state == "parked" and run.is_main and batch == 6:
            # Worker 1 has come to the end of its pass, or is about to, and waits there.
            kill(pid_of("worker", 1))
        optimizer.step()
if mine and state == "after training":
    die()
print("the end")
"""

STATES = [
    "before init",
    "before wrap",
    "waiting in wrap",
    "between wraps",
    "in a pass",
    "in backward",
    "in a step's hook",
    "parked",
    "after training",
]


def check(ended: Ended, role: str, rank: int, how: str, code: int = 5) -> None:
    """The run has failed, says in all places that this process was lost, and where its log is."""
    what = f"{role} {rank} (pid {ended.pid(role, rank)}) {how}"
    assert ended.code == code, ended.err
    assert f"error: {what}\n" in ended.err
    assert f"logs/{role}-{rank}.log" in ended.error
    assert "Traceback" not in ended.err
    assert ended.answer["error"] == what
    assert (ended.answer["status"], ended.answer["exit_code"]) == ("failed", code)
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("failed", code)
    assert (ended.info["status"], ended.info["exit_code"]) == ("failed", code)
    assert ("died", role, rank) in [(e.get("kind"), e.get("role"), e.get("rank")) for e in ended.events]
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


LONG = pytest.mark.long
SAME_SENTENCE = ["in backward", "before init", "waiting in wrap", "parked", "after training"]


@LONG
@pytest.mark.parametrize("state", SAME_SENTENCE)
def test_a_worker_killed_in_any_state_ends_the_run_with_a_sentence(state: str, runner: Runner) -> None:
    """Where none may take its place."""
    ended = runner.run(DYING, "--restarts", "0", args=[state, "1"])
    check(ended, "worker", 1, "was killed by SIGKILL")


@pytest.mark.parametrize("state", [pytest.param(s, marks=LONG) if s != "parked" else s for s in STATES])
def test_another_takes_the_place_of_a_worker_killed_in_any_state(state: str, runner: Runner) -> None:
    ended = runner.run(DYING, args=[state, "1", "once"])
    assert ended.code == 0, ended.err
    died = [event for event in ended.events if event.get("kind") == "died"]
    assert [event["rank"] for event in died] == [1]
    assert died[0]["text"].endswith("was killed by SIGKILL; another takes its place")
    assert died[0]["text"] in ended.err
    assert (ended.summary["status"], ended.summary["epochs"]) == ("done", 2)
    assert ended.log(1).splitlines()[-1] == "the end"
    assert ended.log(0).splitlines()[-1] == "the end"


def test_a_worker_that_dies_again_and_again_ends_the_run(runner: Runner) -> None:
    ended = runner.run(DYING, "--restarts", "2", args=["between wraps", "1"])
    died = [event["text"] for event in ended.events if event.get("kind") == "died"]
    assert len(died) == 3
    last = max(int(re.search(r"pid (\d+)", text)[1]) for text in died)  # type: ignore[index]
    assert ended.code == 5
    assert f"error: worker 1 (pid {last}) was killed by SIGKILL\n" in ended.err
    assert "the 3rd time without getting on in between" in ended.err


def test_the_others_go_on_without_one_that_is_not_replaced(runner: Runner) -> None:
    options = ["--workers", "3", "--restarts", "0", "--min-workers", "2", "--assign", "lease"]
    ended = runner.run(DYING, *options, args=["in a pass", "1"])
    assert ended.code == 0, ended.err
    (died,) = [event for event in ended.events if event.get("kind") == "died"]
    assert died["text"].endswith("was killed by SIGKILL; the other 2 go on without it")
    assert (ended.summary["status"], ended.summary["epochs"]) == ("done", 2)
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


@LONG
def test_fewer_than_the_least_end_the_run(runner: Runner) -> None:
    options = ["--workers", "3", "--restarts", "0", "--min-workers", "2"]
    ended = runner.run(DYING, *options, args=["in a pass", "1,2"])
    assert ended.code == 5
    assert "was killed by SIGKILL" in ended.error


@LONG
@pytest.mark.parametrize(("state", "servers"), [("between wraps", "0"), ("in a pass", "1")])
def test_worker_0_may_be_the_one(state: str, servers: str, runner: Runner) -> None:
    ended = runner.run(DYING, "--restarts", "0", "--servers", servers, args=[state, "0"])
    check(ended, "worker", 0, "was killed by SIGKILL")


def test_a_server_that_is_killed_is_named(runner: Runner) -> None:
    ended = runner.run(DYING, "--restarts", "0", "--servers", "2", args=["server", ""])
    check(ended, "server", 1, "was killed by SIGKILL")


@pytest.mark.parametrize("pace", ["sync", pytest.param("async", marks=LONG)])
def test_another_takes_the_place_of_a_server(pace: str, runner: Runner) -> None:
    ended = runner.run(DYING, "--servers", "2", "--pace", pace, args=["server", "", "once"])
    assert ended.code == 0, ended.err
    died = [event["text"] for event in ended.events if event.get("kind") == "died"]
    assert died
    assert all(text.startswith("server 1 ") and text.endswith("; another takes its place") for text in died)
    assert (ended.summary["status"], ended.summary["epochs"]) == ("done", 2)


def test_several_workers_that_die_at_once_leave_nobody_behind(runner: Runner) -> None:
    ended = runner.run(DYING, "--restarts", "0", "--workers", "4", "--servers", "1", args=["in a pass", "1,2,3"])
    named = next(rank for rank in (1, 2, 3) if f"worker {rank} " in ended.answer["error"])
    check(ended, "worker", named, "was killed by SIGKILL")


@pytest.mark.parametrize(
    ("state", "how"),
    [
        ("exit", "exited with status 3 in the middle of the run"),
        pytest.param("segfault", "was killed by SIGSEGV", marks=LONG),
    ],
)
def test_other_sudden_deaths_are_named(state: str, how: str, runner: Runner) -> None:
    check(runner.run(DYING, "--restarts", "0", args=[state, "1"]), "worker", 1, how)


def test_survivors_that_never_come_back_to_us_are_ended_too(runner: Runner) -> None:
    ended = runner.run(DYING, "--restarts", "0", args=["others stuck", "1"])
    assert "stuck" in ended.out.splitlines()
    check(ended, "worker", 1, "was killed by SIGKILL")


def test_the_zygotes_death_ends_the_run(runner: Runner) -> None:
    ended = runner.run(DYING, "--servers", "1", args=["zygote", ""])
    assert ended.code == 4, ended.err
    assert "error: the process that forks workers" in ended.err
    assert "SIGKILL" in ended.error
    assert "Traceback" not in ended.err
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("failed", 4)
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


def test_nobody_outlives_a_killed_front(runner: Runner) -> None:
    running = runner.start_run(DYING, "--servers", "1", args=["until killed", ""])
    running.until("training\n")
    others = open_pids(running.others())
    assert len(others) == 5  # launcher, zygote, server, two workers
    running.signal(signal.SIGKILL)
    await_death(others)
    assert running.end().code == -signal.SIGKILL
