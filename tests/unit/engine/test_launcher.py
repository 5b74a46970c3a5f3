"""A launcher that dies at any moment, and another that goes on: the run is as if there had been one.

The launcher is the real one, with its files, sockets and memory; front, zygote and members are played here. It is
killed by an exception at a counted moment, before or after anything that it says, writes or reads.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from paceline import events
from paceline.config import Job
from paceline.engine.launcher.launcher import _Launcher
from paceline.engine.launcher.metrics import Row
from paceline.engine.setup import Setup, encode_job
from paceline.protocol import messages
from paceline.transport.board import Board
from paceline.transport.channel import Channel

# The dead close nothing.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

MOMENTS = {"send", "_send", "peek", "consume", "append", "take", "flush", "write_info", "tell_death", "fork", "open"}
FILES = ("channel.py", "channels.py", "diary.py", "recorder.py", "telling.py", "board.py", "launcher.py", "saver.py")
FILES += ("hands.py", "hearing.py", "processes.py")
MEMBERS = [("worker", 0), ("worker", 1), ("server", 0)]


class Killed(BaseException):
    pass


def row(key: int, contributors: int) -> bytes:
    sums = {"steps": 1, "loss_sum": 4.0 * key, "loss_samples": 4.0, "samples": 4.0, "time_s": 100.0 + key}
    return Row(stepped=True, key=key, contributors=contributors, epoch=1, **sums).pack()  # type: ignore[arg-type]


def wrap(number: int, kind: str, what: str) -> messages.Wrap:
    return messages.Wrap(number, kind, bytes(40_000), 4096, what)


def part(documents: dict[str, Any], step: int) -> messages.Part:
    encoded = {name: msgspec.json.encode(value) for name, value in documents.items()}
    return messages.Part(3, step, msgspec.msgpack.encode(({}, encoded)))


class World:
    """Front, zygote, workers and servers, as far as a launcher can tell."""

    def __init__(self, folder: Path) -> None:
        job = Job(name="played", workers=2, servers=1, runs=folder)
        self.directory = folder / "run"
        self.directory.mkdir()
        (self.directory / "logs").mkdir()
        setup = msgspec.msgpack.encode(Setup(encode_job(job), str(self.directory), 1))
        self.begin = messages.Begin(setup, str(self.directory), ["paceline"], 1)
        self.held: dict[tuple[Any, ...], tuple[messages.Hold, int]] = {}
        self.shown: dict[str, int] = {}
        self.records: list[Any] = []
        self.deaths: list[str] = []
        self.outcome: messages.Outcome | None = None
        self.keep(messages.Hold("board"), Board.create(2, 1))
        self.zygote, its = Channel.pair()
        self.keep(messages.Hold("channel", "zygote"), its._sock.detach())
        self.births: dict[tuple[str, int], int] = {}
        self.channels: dict[tuple[str, int], Channel] = {}
        self.memory: dict[tuple[str, int], dict[int, int]] = {member: {} for member in MEMBERS}
        self.stopped: set[tuple[str, int]] = set()
        self.scene = 0

    def keep(self, hold: messages.Hold, fd: int) -> None:
        before = self.held.pop((hold.what, hold.role, hold.rank, hold.number), None)
        if before is not None:
            os.close(before[1])
        self.held[hold.what, hold.role, hold.rank, hold.number] = hold, fd

    def hear(self, front: Channel) -> None:
        """Take what a launcher has told the front."""
        for message, descriptors, _, size in iter_all(front):
            match message:
                case messages.Hold():
                    self.keep(message, descriptors[0])
                case messages.Show(file=file, place=place, records=records):
                    self.records += msgspec.msgpack.decode(records, type=list[events.Record])
                    self.shown[file] = place
                case messages.Drop(number=number):
                    for name in [n for n in self.held if "part" in n[0] and n[3] <= number]:
                        os.close(self.held.pop(name)[1])
                case messages.Outcome():
                    self.outcome = message
            front.consume(size)

    def play(self) -> None:
        """Zygote and members do what they do next, if what they wait for has come."""
        for order, descriptors, _, size in iter_all(self.zygote):
            assert isinstance(order, messages.Fork)
            whose = order.role, order.rank
            if order.birth > self.births.get(whose, 0):
                assert order.birth == self.births.get(whose, 0) + 1
                self.births[whose] = order.birth
                self.memory[whose] = {}
                mine, its = socket.socketpair()
                self.channels[whose] = Channel(mine)
                self.zygote.send(messages.Forked(*whose, 100 * order.birth + order.rank), (its.fileno(),))
                its.close()
            for fd in descriptors:
                os.close(fd)
            self.zygote.consume(size)
        for member, channel in self.channels.items():
            for message, descriptors, _, size in iter_all(channel):
                if isinstance(message, messages.Memory):
                    inode = os.fstat(descriptors[0]).st_ino
                    assert self.memory[member].setdefault(message.number, inode) == inode, "one number, two memories"
                elif isinstance(message, messages.Stop):
                    self.stopped.add(member)
                for fd in descriptors:
                    os.close(fd)
                channel.consume(size)
        while self.scene < len(SCENES) and SCENES[self.scene][0](self):
            SCENES[self.scene][1](self)
            self.scene += 1

    def say(self, rank: int, *said: messages.Any) -> None:
        for message in said:
            self.channels["worker", rank].send(message)

    def end(self, role: str, rank: int, status: int) -> None:
        self.channels.pop((role, rank)).close()
        self.zygote.send(messages.Exited(role, rank, 100 * self.births[role, rank] + rank, status))

    def give_parts(self) -> None:
        for rank in (0, 1):
            fd = os.memfd_create("part")
            os.ftruncate(fd, 64)
            if rank == 0:
                self.channels["worker", 0].send(part({"state": {"step": 3}}, 3), (fd,))
            self.channels["worker", rank].send(part({f"worker-{rank}": {"own": rank}}, 0), (fd,))
            os.close(fd)


def iter_all(channel: Channel) -> Any:
    """What is there to be read; each is to be consumed before the next is asked for."""
    while peeked := channel.peek():
        for other in peeked[1:]:
            for fd in other.descriptors:
                os.close(fd)
        yield peeked[0]


def have(number: int, *members: tuple[str, int]) -> Any:
    return lambda world: all(number in world.memory[member] for member in members or MEMBERS)


def always(world: World) -> bool:
    return True


SCENES: list[tuple[Any, Any]] = [
    (always, lambda world: world.zygote.send(messages.Ready({"torch": "2"}))),
    (
        lambda world: len(world.births) == 3,
        lambda world: [world.say(rank, wrap(1, "exchange", "SGD over 5 parameters")) for rank in (0, 1)],
    ),
    (have(1), lambda world: world.say(0, messages.Pass(0, 0, 9), messages.Steps(row(1, 2) + row(2, 2)))),
    (always, lambda world: world.say(1, messages.Steps(row(1, 2)), wrap(2, "copy", "2 tensors"))),
    (always, lambda world: world.say(0, messages.Logged(3, {"a": 1.5}), wrap(2, "copy", "2 tensors"))),
    (have(2, *MEMBERS[:2]), lambda world: world.say(1, messages.Steps(row(2, 2) + row(3, 2)))),
    (always, lambda world: world.say(0, messages.Steps(row(3, 2)), messages.Steps(row(4, 2)))),
    (always, World.give_parts),
    (always, lambda world: (world.say(1, messages.Steps(row(4, 2))), world.end("worker", 1, -9))),
    (
        lambda world: world.births["worker", 1] == 2,
        lambda world: world.say(1, wrap(1, "exchange", "SGD over 5 parameters"), wrap(2, "copy", "2 tensors")),
    ),
    (have(2, ("worker", 1)), lambda world: world.end("server", 0, -11)),
    (have(1, ("server", 0)), lambda world: world.say(0, messages.Steps(row(5, 2)), messages.Ended("5 steps done"))),
    (always, lambda world: (world.say(1, messages.Steps(row(5, 2)), messages.Finished()), world.end("worker", 1, 0))),
    (always, lambda world: (world.say(0, messages.Finished()), world.end("worker", 0, 0))),
    (lambda world: ("server", 0) in world.stopped, lambda world: world.end("server", 0, 0)),
]


def launch(world: World, moment: int) -> int:
    """One launcher, to the run's end or to its own; how many of its moments are left."""
    mine, its = Channel.pair()
    held = [(hold, os.dup(fd)) for hold, fd in world.held.values()]
    begin = msgspec.structs.replace(world.begin, shown=dict(world.shown), deaths=list(world.deaths))
    left = moment

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        code = frame.f_code
        if event in ("call", "return") and code.co_name in MOMENTS and code.co_filename.endswith(FILES):
            left -= 1
            if left == 0:
                raise Killed

    launcher: Any = None
    try:
        sys.setprofile(count)
        launcher = _Launcher(its, begin, held)
        for _ in range(1000):
            if launcher._processes.are_over:
                break
            sys.setprofile(None)
            world.hear(mine)
            world.play()
            sys.setprofile(count)
            launcher._turn()
        else:
            raise AssertionError(f"stuck in scene {world.scene}")
        launcher.run([])
    except Killed:
        if launcher is not None and launcher._saver._thread is not None:
            launcher._saver._thread.join()  # a kill takes it along; here it might meet the next one's
        world.deaths.append(f"launcher {len(world.deaths)} has died")
    finally:
        sys.setprofile(None)
    world.hear(mine)
    mine.close()
    return left


def files(world: World) -> dict[str, Any]:
    """What the run has left, without times and without the deaths of launchers."""
    lines = [json.loads(line) for line in (world.directory / "events.jsonl").read_text().splitlines()]
    told = [{key: value for key, value in line.items() if key != "time_s"} for line in lines]
    summary = json.loads((world.directory / "summary.json").read_text())
    info = json.loads((world.directory / "run.json").read_text())
    metrics = [json.loads(line) for line in (world.directory / "metrics.jsonl").read_text().splitlines()]
    for metric in metrics:
        del metric["time_s"]
    return {
        "metrics": metrics,
        "events": sorted(
            str(line) for line in told if line.get("role") != "launcher" and line.get("kind") != "checkpoint"
        ),  # in which order two workers were heard is nobody's business
        "checkpoints": {line["text"].removesuffix("-2") for line in told if line.get("kind") == "checkpoint"},
        "summary": {name: summary[name] for name in ("status", "steps", "samples", "reason", "loss", "exit_code")},
        "processes": [process for process in info["processes"] if process["role"] != "launcher"],
        "births": world.births,
        "deaths": list(Board(_mapped(world)).deaths),
    }


def _mapped(world: World) -> Any:
    from paceline.transport import segment

    return segment.attach(world.held["board", "", 0, 0][1])


def played(folder: Path, *moments: int) -> tuple[World, int]:
    """A run whose launchers die at these of their moments; how many moments the last had left."""
    folder.mkdir()
    world = World(folder)
    for moment in moments:
        left = launch(world, moment)
        if world.outcome is not None:
            return world, left
    launch(world, 10**9)
    return world, 0


@pytest.fixture(autouse=True)
def _many_descriptors() -> Any:
    """The dead leave theirs to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    gc.collect()
    for fd in set(os.listdir("/proc/self/fd")) - before:
        try:
            os.close(int(fd))
        except OSError:
            continue
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_run_of_one_launcher(tmp_path: Path) -> None:
    world, _ = played(tmp_path / "one")
    left = files(world)
    assert left["summary"] == {
        "status": "done", "steps": 5, "samples": 40, "reason": "5 steps done", "loss": 5.0, "exit_code": 0,
    }  # fmt: skip
    assert sum("; another takes its place" in event for event in left["events"]) == 2
    assert left["births"] == {("worker", 0): 1, ("worker", 1): 2, ("server", 0): 2}
    assert (left["deaths"], len(left["checkpoints"])) == ([0, 1], 1)


@pytest.mark.parametrize("first", [1, *(pytest.param(first, marks=pytest.mark.long) for first in (4, 7))])
def test_wherever_a_launcher_dies_the_run_is_the_same(first: int, tmp_path: Path) -> None:
    """A ninth of all moments, and a third with `make long`; with steps of 1 it is all."""
    whole = files(played(tmp_path / "one")[0])
    for moment in itertools.count(first, 9):
        world, left = played(tmp_path / str(moment), moment)
        found = files(world)
        where = str(tmp_path / str(moment))
        found["checkpoints"] = {text.replace(where, str(tmp_path / "one")) for text in found["checkpoints"]}
        assert found == whole, f"killed at moment {moment}"
        shown = [record.step for record in world.records if isinstance(record, events.Metric)]
        assert shown == [1, 2, 3, 4, 5], f"killed at moment {moment}"
        notices = [record.text for record in world.records if isinstance(record, events.Notice)]
        assert len(notices) == len(set(notices)), f"killed at moment {moment}"
        if left > 0:
            break
    assert moment > 300
