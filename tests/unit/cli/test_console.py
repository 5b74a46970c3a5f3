"""Claims about the face of a run, from streams of records and the text they leave on a screen."""

import io
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console as Screen

from paceline.cli.console import Console, ending, header, live_line
from paceline.cli.progress import Standing
from paceline.config import Job
from paceline.events import Epoch, Notice, Output, Started, Summary, Wrapped
from tests.unit.cli.played import metric, summary

JOB = Job("train", epochs=1)


class Clock:
    """A clock that goes a fixed time forward at every look."""

    def __init__(self, tick_s: float) -> None:
        self._now_s, self._tick_s = 0.0, tick_s

    def __call__(self) -> float:
        self._now_s += self._tick_s
        return self._now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What a terminal shows in the end: what was erased is gone, colours are taken away."""
        shown = [re.split(r"\r\x1b\[2K", line)[-1] for line in self.getvalue().split("\n")]
        return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in shown]


def plain(tick_s: float = 1.0, **options: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    screen = Screen(file=stream, width=80, highlight=False, markup=False)
    return Console(JOB, screen, stream, live=False, now=Clock(tick_s), **options), stream


def live(terminal: Terminal, tick_s: float = 1.0) -> Console:
    screen = Screen(file=terminal, width=80, force_terminal=True, highlight=False, markup=False)
    return Console(JOB, screen, terminal, live=True, now=Clock(tick_s))


def test_plain_output_is_lines_and_a_progress_line_every_ten_seconds() -> None:
    console, stream = plain(tick_s=1.0)
    console(Started("runs/a", []))
    console(Wrapped(0.1, 1_600_000, 6_400_000, "AdamW"))
    console(Epoch(0.1, 1, 100))
    for step in range(1, 26):
        console(metric(step))
    console(Output("hello\n"))
    console(Notice(2.5, "straggler", "worker 1 is slow"))
    console(Notice(2.6, "join", "worker 9 is here"))

    assert stream.getvalue().splitlines() == [
        "run runs/a",
        "train · 1.6 M parameters · AdamW · 6.4 MB of shared memory",
        "epoch 1/1   10 %  loss 2.00  320 samples/s  sent 0 MB (shared memory)  ETA 0:09",
        "epoch 1/1   20 %  loss 2.00  320 samples/s  sent 0 MB (shared memory)  ETA 0:08",
        "hello",
        "2.5 s: worker 1 is slow",
    ]


def test_records_without_end_are_drawn_ten_times_a_second_at_most() -> None:
    terminal = Terminal()
    console = live(terminal, tick_s=0.0002)  # five thousand rounds a second
    console(Epoch(0.0, 1, 10_000))
    for step in range(1, 10_001):
        console(metric(step, time_s=step / 5000))
    assert terminal.getvalue().count("epoch 1/1") <= 20


def test_the_scripts_output_stands_above_the_live_line_unharmed() -> None:
    terminal = Terminal()
    console = live(terminal)
    console(Epoch(0.0, 1, 10))
    console(metric(1))
    console(Output("[not markup] \x1b[31mred\x1b[0m " + "long " * 40 + "\n"))
    console(metric(2))
    assert "[not markup] \x1b[31mred\x1b[0m " + "long " * 40 + "\n" in terminal.getvalue()
    assert terminal.lines()[0] == "[not markup] red " + "long " * 40
    assert terminal.lines()[-1].startswith("epoch 1/1 ━━━")


def test_the_last_round_is_drawn_when_the_script_goes_on_to_something_else() -> None:
    terminal = Terminal()
    console = live(terminal, tick_s=0.06)  # every second look is due
    console(Epoch(0.0, 1, 5))
    for step in range(1, 6):
        console(metric(step))
    drawn = "100 %" in terminal.lines()[-1]
    console(Output("evaluating\n"))
    assert (drawn, "100 %" in terminal.lines()[-1]) == (False, True)


def test_half_a_line_waits_for_its_end_below_a_live_line() -> None:
    terminal = Terminal()
    console = live(terminal)
    console(Epoch(0.0, 1, 10))
    console(metric(1))
    console(Output("one, "))
    assert "one" not in terminal.getvalue()
    console(Output("two\nthr"))
    assert terminal.lines()[0] == "one, two"
    console.settle()
    console.say("over")
    assert terminal.lines() == ["one, two", "thr", "over", ""]


def test_plain_lines_do_not_cut_the_scripts_lines() -> None:
    console, stream = plain(tick_s=20.0)
    console(Output("dots"))
    console(metric(1))
    console(Output("...\n"))
    assert stream.getvalue() == "dots...\n"


def test_quiet_leaves_the_scripts_output_alone() -> None:
    console, stream = plain(tick_s=20.0, quiet=True)
    for record in (Started("runs/a", []), metric(1), Output("mine"), Notice(1, "x", "y"), metric(2)):
        console(record)
    console(summary(JOB, Path("runs/a")))
    console.say("done")
    assert stream.getvalue() == "mine"


def test_output_and_our_lines_can_go_to_different_streams() -> None:
    ours, theirs = io.StringIO(), io.StringIO()
    screen = Screen(file=ours, width=80, highlight=False, markup=False)
    console = Console(JOB, screen, theirs, live=False, now=Clock(20.0))
    console(Output("half"))
    console(metric(1))
    console.say("said")
    assert theirs.getvalue() == "half"
    assert ours.getvalue().splitlines()[1] == "said"


@pytest.mark.parametrize("width", [1, 10, 40, 60, 80, 200])
def test_the_live_line_never_wraps(width: int) -> None:
    standing = Standing("epoch 1/1", 5, 10, 2.41, 3900, 0, 21)
    assert live_line(standing, width).cell_len <= width


def test_a_narrow_live_line_says_less_and_keeps_what_matters() -> None:
    standing = Standing("epoch 1/1", 5, 10, 2.41, 3900, 0, 21)
    ending = "   50 %  loss 2.41  3,900 samples/s  "
    assert live_line(standing, 110).plain == f"epoch 1/1 {'━' * 20}{ending}sent 0 MB (shared memory)  ETA 0:21"
    assert live_line(standing, 79).plain == f"epoch 1/1 {'━' * 6}╸{'━' * 6}{ending}sent 0 MB  ETA 0:21"
    assert live_line(standing, 66).plain == f"epoch 1/1{ending}sent 0 MB  ETA 0:21"
    assert live_line(standing, 55).plain == f"epoch 1/1{ending}ETA 0:21"


def test_header_names_the_processes_and_the_pace() -> None:
    assert " · 2 workers on this machine (" in header(JOB)
    assert " · 1 worker and 2 servers on this machine (" in header(Job("train", workers=1, servers=2))
    assert header(JOB).endswith(" · pace sync · engine local")


def test_header_does_not_say_that_workers_are_here_where_others_start_them() -> None:
    assert " · 2 workers started by torchrun, home on this machine (" in header(Job("train", engine="torchrun"))
    by_ray = header(Job("train", servers=2, engine="ray"))
    assert " · 2 workers started by Ray, 2 servers and home on this machine (" in by_ray
    assert by_ray.endswith(" · pace sync · engine ray")
    apart = header(Job("train", servers=2, engine="ray", servers_apart=True))
    assert " · 2 workers started by Ray, 2 servers and home alone on this machine (" in apart
    on_two = header(Job("train", servers=3, engine="torchrun", servers_apart=True, server_hosts=2))
    assert " · 2 workers started by torchrun, 3 servers on 2 hosts, home on this machine (" in on_two


def test_ending_says_how_it_went() -> None:
    end = Summary(
        run="a", status="done", pace="sync", workers=2, servers=0, steps=9, samples=99, seconds=58.0,
        samples_per_s=3900.0, loss=1.98, waiting=0.04, bytes_sent=0,
    )  # fmt: skip
    assert ending(end, "1.9x one process") == (
        "done in 0:58 · loss 1.98 · 1.9x one process · 3,900 samples/s · waited 4 % of the time"
    )
    logged = msgspec.structs.replace(end, values={"lr": 0.5, "val_loss": 0.25, "epoch": 3.0, "best": None})
    assert ending(logged).startswith("done in 0:58 · loss 1.98 · val_loss 0.250 · epoch 3 · best - · 3,900 samples/s")
    by_step = msgspec.structs.replace(end, samples=0, samples_per_s=0.0)  # nobody knows how many there were
    assert ending(by_step) == "done in 0:58 · loss 1.98 · 0.155 steps/s · waited 4 % of the time"
    end = Summary(
        run="a", status="failed", pace="sync", workers=2, servers=0, steps=0, samples=0, seconds=0.0,
        samples_per_s=0.0, loss=None, waiting=0.0, bytes_sent=0,
    )  # fmt: skip
    assert ending(end) == "failed after 0.0 s · no step was recorded"
