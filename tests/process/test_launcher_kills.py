"""The launcher may be killed at any moment: another goes on where it was, and training has not noticed."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest

from tests.process import kills
from tests.process.runner import ROOT, Ended, Runner, await_death, open_pids
from tests.process.test_interrupt import ENDLESS

# In the launcher's own process: counts what it says, writes and reads, before and after each, and kills it at the
# ``KILL_AT``-th of these moments; as many launchers as ``KILL_TIMES``.
KILLING = """
import os
import signal
import sys

MOMENTS = {"send", "consume", "append", "take", "flush", "write_info", "tell_death", "_send", "_fork", "close"}
FILES = ("channel.py", "diary.py", "recorder.py", "board.py", "launcher.py", "saver.py")


def count(frame, event, argument):
    global left
    code = frame.f_code
    if event in ("call", "return") and code.co_name in MOMENTS and code.co_filename.endswith(FILES):
        left -= 1
        if left == 0:
            for number in range(int(os.environ["KILL_TIMES"])):
                try:
                    os.close(os.open(f"killed-{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)


if any("paceline.engine.launcher.launcher" in argument for argument in sys.orig_argv):
    left = int(os.environ["KILL_AT"])
    sys.setprofile(count)
"""

STEPS, EPOCHS = 6, 2

# Worker 1 dies once, in the second pass.
SCRIPT = """
import json
import os
import signal

from counting import job, mark

import paceline

run = paceline.init()
counts, optimizer, loader = job(48)
optimizer, loader = run.wrap(optimizer, loader)
for epoch in range(2):
    for batch, (numbers,) in enumerate(loader):
        mark(counts, numbers)
        if run.rank == 1 and epoch == 1 and batch == 2:
            try:
                os.close(os.open("died", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        run.log(loss=float(epoch))
        print("step", run.step, flush=True)
if run.is_main:
    (run.directory / "counts.json").write_text(json.dumps(counts.detach().tolist()))
"""


def killed_at(runner: Runner, moment: int, times: int, *options: str) -> Ended:
    runner.write("sitecustomize.py", KILLING)
    runner.write("counting.py", kills.COUNTING)
    told = {"KILL_AT": str(moment), "KILL_TIMES": str(times), "PYTHONPATH": f"{ROOT}:{runner.folder}"}
    return runner.start_run(SCRIPT, "--checkpoint-every", "5", *options, **told).end()


def check(ended: Ended, launchers: int) -> None:
    """All is as if no launcher had died, but that it is told."""
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [EPOCHS] * 48
    roles = Counter(process["role"] for process in ended.info["processes"])
    died = [event for event in ended.events if event.get("kind") == "died"]
    told = [event["text"] for event in died if event["role"] == "launcher"]
    assert len(set(told)) == len(told) == launchers
    assert all("was killed by SIGKILL; another (pid " in text and text in ended.err for text in told)
    assert roles["launcher"] <= launchers + 1  # one killed at its very start has not come to say that it is there
    steps = [metric["step"] for metric in ended.metrics]
    assert sorted(set(steps)) == steps
    assert steps[-1] == ended.summary["steps"] >= STEPS * EPOCHS  # more where worker 1 came back to what it had left
    kinds = Counter(event["type"] if event["type"] != "notice" else event["kind"] for event in ended.events)
    assert (kinds["wrapped"], kinds["leave"], kinds["died"]) == (1, 2, launchers + 1)
    assert kinds["checkpoint"] >= 1
    assert ended.out.splitlines()[:-1] == [*ended.log(0).splitlines()]
    assert (ended.info["status"], ended.summary["status"]) == ("done", "done")
    assert not (ended.directory / "launcher.diary").exists()
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "moment", [60, *(pytest.param(at, marks=LONG) for at in (1, 8, 20, 33, 47, 75, 90, 110, 130, 160, 200))]
)
def test_another_goes_on_wherever_the_launcher_was(moment: int, runner: Runner) -> None:
    """In its start, while the others are forked, when memory is shared, at a worker's death, at a checkpoint."""
    ended = killed_at(runner, moment, 1, "--servers", "1")
    check(ended, 1)


@pytest.mark.parametrize(
    "options",
    ["--pace async --servers 2", *(pytest.param(f"--pace {pace}", marks=LONG) for pace in ("sync", "bounded:1"))],
)
def test_whoever_is_killed_each_sample_counts_once_an_epoch(options: str, runner: Runner) -> None:
    given = ["--workers", "3", *options.split()]
    ended = kills.run(runner, *given, samples=1200, epochs=3, kills=8, chance=0.03, seed=2, launchers=True)
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory / "counts.json").read_text()) == [3] * 1200
    assert "launcher" in {event["role"] for event in ended.events if event.get("kind") == "died"}
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


def test_launchers_that_die_at_their_start_again_and_again_end_the_run(runner: Runner) -> None:
    ended = killed_at(runner, 5, 99)
    assert ended.code == 4
    assert ended.error.startswith("the launcher (pid ")
    assert "was killed by SIGKILL" in ended.error
    assert "3 launchers one after the other" in ended.error
    assert (ended.summary["status"], ended.info["status"]) == ("failed", "failed")
    await_death(open_pids(process["pid"] for process in ended.info["processes"]))


@pytest.mark.parametrize("how", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=LONG)])
def test_ctrl_c_is_obeyed_after_another_has_taken_over(how: signal.Signals, runner: Runner) -> None:
    running = runner.start_run(ENDLESS, "--workers", "2")
    running.until("round 20\n")
    running.signal_launcher(how)
    running.until("goes on from")
    assert "training went on meanwhile" in running.err
    running.signal(signal.SIGINT)
    ended = running.end()
    assert ended.code == 130, ended.err
    assert (ended.answer["status"], ended.info["status"]) == ("interrupted", "interrupted")
    assert "checkpoint" in [event.get("kind") for event in ended.events]
    rounds = ended.metrics[-1]["step"]
    assert [metric["step"] for metric in ended.metrics] == [*range(1, rounds + 1)]
    for log in (ended.log(0), ended.log(1)):
        assert log.splitlines()[-2:] == [f"interrupted after round {rounds}", "cleaned up"]


def test_nobody_outlives_the_front_after_another_has_taken_over(runner: Runner) -> None:
    running = runner.start_run(ENDLESS, "--servers", "1")
    running.until("round 5\n")
    running.signal_launcher(signal.SIGKILL)
    running.until("goes on from")
    others = open_pids(running.others())
    running.signal(signal.SIGKILL)
    await_death(others)
    assert running.end().code == -signal.SIGKILL
