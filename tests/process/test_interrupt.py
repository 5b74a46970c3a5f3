"""Ctrl-C: the first lets the round finish and the script clean up, the second is obeyed at once."""

from __future__ import annotations

import signal

import pytest

from tests.process.runner import ROOT, Ended, Runner, Running

# Endless; every worker writes the rounds it has finished and how it was interrupted.
ENDLESS = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

run = paceline.init()
model = nn.Linear(6, 1)
optimizer = torch.optim.Adam(model.parameters())
loader = DataLoader(TensorDataset(torch.randn(52, 6)), batch_size=4)
model, optimizer, loader = run.wrap(model, optimizer, loader)
print("training")
try:
    while True:
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
            if run.is_main:
                print("round", run.step)
except KeyboardInterrupt:
    print("interrupted after round", run.step)
    while "--deaf" in sys.argv:
        pass
finally:
    print("cleaned up")
"""

# Tells when the zygote has begun to import torch; nothing else could be seen of that from outside.
TELLING = """
import sys

if any("paceline.engine.launcher.zygote" in argument for argument in sys.orig_argv):
    print("the zygote has begun", file=sys.stderr, flush=True)
"""


def check(ended: Ended) -> None:
    assert ended.code == 130, ended.err
    assert ended.error.startswith("stopped by Ctrl-C")
    assert "Traceback" not in ended.err
    assert (ended.answer["status"], ended.answer["exit_code"]) == ("interrupted", 130)
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("interrupted", 130)
    assert (ended.info["status"], ended.info["exit_code"]) == ("interrupted", 130)


def begin(runner: Runner) -> Running:
    """A run whose zygote has just begun."""
    runner.write("sitecustomize.py", TELLING)
    running = runner.start_run(ENDLESS, PYTHONPATH=f"{ROOT}:{runner.folder}")
    running.until("the zygote has begun")
    return running


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGHUP]
)  # SIGINT: test_paces.py too
def test_all_workers_stop_after_the_same_round_and_clean_up(number: int, runner: Runner) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # not ignored, as by nohup, which the run would inherit
    running = runner.start_run(ENDLESS, "--workers", "3", "--servers", "1")
    signal.signal(number, before)
    running.until("round 20\n")
    running.signal(number)
    ended = running.end()
    check(ended)

    rounds = ended.metrics[-1]["step"]
    assert rounds >= 20
    assert [metric["step"] for metric in ended.metrics] == [*range(1, rounds + 1)]
    for log in (ended.log(0), ended.log(1), ended.log(2)):
        assert log.splitlines()[-2:] == [f"interrupted after round {rounds}", "cleaned up"]
    assert ended.out.splitlines()[-3:-1] == [f"interrupted after round {rounds}", "cleaned up"]


def test_the_second_ends_a_script_that_does_not_listen(runner: Runner) -> None:
    running = runner.start_run(ENDLESS, args=["--deaf"])
    running.until("round 5\n")
    running.signal(signal.SIGINT)
    running.until("interrupted after round")
    running.signal(signal.SIGINT)
    ended = running.end()
    check(ended)
    assert "cleaned up" not in ended.out + ended.log(1)


def test_a_termination_during_the_start_is_obeyed_in_the_first_round(runner: Runner) -> None:
    running = begin(runner)
    running.signal(signal.SIGTERM)
    ended = running.end()
    check(ended)
    first_round = ["training", "round 1", "interrupted after round 1", "cleaned up"]
    # On a machine so slow that the patience with a first Ctrl-C ends before the scripts begin, they never do.
    assert ended.out.splitlines()[:-1] in (first_round, [])


def test_two_during_the_start_end_it_before_the_script_begins(runner: Runner) -> None:
    running = begin(runner)
    running.signal(signal.SIGTERM)  # two of one kind might arrive as one
    running.signal(signal.SIGINT)
    ended = running.end()
    check(ended)
    assert len(ended.out.splitlines()) == 1


# Ctrl-C while the picture is drawn, and while Python ends.
LATE = """
import atexit
import os
import signal
import sys

if "paceline" in sys.orig_argv and "run" in sys.orig_argv:
    def interrupt(*event):
        if not event or event[0] == "import" and event[1][0] == "matplotlib":
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(lambda *event: interrupt(*event))
    atexit.register(interrupt)
    print("will be interrupted", file=sys.stderr, flush=True)
"""
SHORT = ENDLESS.replace("while True:", "for _ in range(2):").replace(
    "optimizer.step()\n", "optimizer.step()\n            run.log(loss=1.0)\n"
)


def test_when_the_run_is_over_it_is_too_late(runner: Runner) -> None:
    runner.write("sitecustomize.py", LATE)
    ended = runner.start_run(SHORT, PYTHONPATH=f"{ROOT}:{runner.folder}").end()
    assert "will be interrupted" in ended.err
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert "done" in ended.err
    assert (ended.folder / str(ended.answer["plot"])).exists()
    assert (ended.answer["status"], ended.summary["status"]) == ("done", "done")
