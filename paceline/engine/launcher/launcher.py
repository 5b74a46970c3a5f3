"""The launcher of a run on this machine: its coordinator's hands and eyes. A process of its own (``front.py``).

It has workers and servers forked by the zygote (``processes.py``), hears what they say (``hearing.py``), asks the pure
``Coordinator`` and does what that decides (``hands.py``), watches every process (``lookout.py``), and has told what
happens (``telling.py``). It holds no lock and runs one loop.

It may be killed. What has come to it is in its diary (``diary.py``), what it has made is kept by the front, and
the next launcher goes on from there. So whatever a message leads to here may be done twice: a process is forked once a
birth, memory is made once a number, a death has its count, a line of a file that is there is not written again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from paceline import errors, events
from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.saver import PARTS, Saver
from paceline.engine.launcher.channels import ZYGOTE, Channels
from paceline.engine.launcher.control import Control
from paceline.engine.launcher.diary import NAME, Diary, Entry
from paceline.engine.launcher.hands import FINISHED, Hands
from paceline.engine.launcher.hearing import Hearing
from paceline.engine.launcher.lookout import Lookout
from paceline.engine.launcher.memories import Memories
from paceline.engine.launcher.metrics import seconds_a_step
from paceline.engine.launcher.processes import Processes
from paceline.engine.launcher.readings import Readings
from paceline.engine.launcher.telling import Telling
from paceline.engine.launcher.watch import Whose
from paceline.engine.launcher.wishes import Wishes
from paceline.engine.name import name_process
from paceline.engine.setup import Setup, decode_job
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator, how_ended
from paceline.protocol.effects import Came, Died, GiveUp, Interrupted, Wished
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel, Closed
from paceline.transport.frame import encode
from paceline.transport.lock import Lock

_TICK_S = 0.05
_INTERRUPT_S = 10.0  # between Ctrl-C and killing processes
_PR_SET_PDEATHSIG = 1
_INTERRUPTED = messages.Failed("Interrupted", "stopped by Ctrl-C")


def main(descriptor: int) -> None:
    """Launch what the front behind ``descriptor`` says, to its end; end when the front does."""
    _end_with_parent()
    name_process("paceline:launch")
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides what they mean
        signal.signal(number, signal.SIG_IGN)
    front = Channel(socket.socket(fileno=descriptor))
    held: list[tuple[messages.Hold, int]] = []
    with contextlib.suppress(Closed):
        while True:
            said = front.drain()
            for place, (message, descriptors) in enumerate(said):
                if isinstance(message, messages.Begin):
                    _Launcher(front, message, held).run(said[place + 1 :])
                    return
                assert isinstance(message, messages.Hold)
                held.append((message, descriptors[0]))


def _end_with_parent() -> None:
    """Whatever ends the front ends the run. ``main`` finds it gone already where this comes too late."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _Launcher:
    def __init__(self, front: Channel, begin: messages.Begin, held: list[tuple[messages.Hold, int]]) -> None:
        self._front = front
        job = self._job = decode_job(msgspec.msgpack.decode(begin.setup, type=Setup).job)
        directory = Path(begin.directory)
        diary = self._diary = Diary(directory / NAME)
        again = diary.first is not None
        began_s = None if diary.first is None else diary.first.time_s
        telling = self._telling = Telling(job, begin, began_s, front.send)
        self._info, self._merger = telling.info, telling.merger
        # Who has data that nobody else has, or reads it for all, cannot be replaced.
        restarts = 0 if job.data == "served" else job.restarts
        coordinator = Coordinator(job.workers, job.servers, restarts=restarts, min_workers=job.min_workers)
        self._coordinator, self._wishes = coordinator, Wishes(job, coordinator)
        self._control = Control(directory)
        self._saver = Saver(Checkpoints(directory, job.keep), job.workers, telling.note_now)
        self._readings = Readings()
        self._interrupts = 0
        self._dropped = 0
        # Of checkpoints that are not written yet, as the front has them.
        self._parts: dict[tuple[int, int, int], int] = {}
        channels = self._channels = Channels(front)
        board_fd = next(fd for hold, fd in held if hold.what == "board")
        board = self._board = Board(segment.attach(board_fd))
        memories = self._memories = Memories(front, board, Lock(board_fd, board.journal))
        self._lookout = Lookout(board, job.hang_timeout)
        logs, count = directory / "logs", job.workers + job.servers
        processes = self._processes = Processes(channels, logs, begin.setup, board_fd, count)
        hearing = self._hearing = Hearing(diary, channels, telling, board, memories, self._take)
        note = partial(hearing.note, "launcher")
        self._hands = Hands(coordinator, board, memories, channels, processes, telling, note)
        ends = self._take_over(held)
        telling.add_process("front", begin.front)
        told: set[str] = set()
        if again:
            told = self._go_on(begin, ends)
        else:
            telling.add_process("launcher", os.getpid())
            for file, place in telling.recorder.places.items():
                telling.show(file, place, [])
            channels.open_those([ZYGOTE], ends)
            frame = encode(msgspec.structs.replace(begin, setup=b""))
            diary.append(Entry(telling.started_s, "front", 0, frame, telling.recorder.places))
        telling.write_info()
        self._tell_of_launchers(begin.deaths, told)

    def _take_over(self, held: list[tuple[messages.Hold, int]]) -> dict[Whose, int]:
        """What the front keeps. The ends of channels."""
        ends = {}
        for hold, fd in held:
            match hold.what:
                case "channel":
                    ends[hold.role, hold.rank] = fd
                case "payload":
                    self._processes.call = fd
                case "memory":
                    self._memories.keep(msgspec.msgpack.decode(hold.about, type=messages.Memory), fd)
                case what if what in PARTS:
                    self._parts[hold.rank, hold.number, what == PARTS[0]] = fd
        return ends

    def run(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """The whole life of the run. ``said``: what the front has said since."""
        self._heed(said)
        while not self._processes.are_over:
            self._turn()
        self._saver.close()
        self._control.close()
        if self._coordinator.was_interrupted:
            self._hands.fail("launcher", 0, _INTERRUPTED)
        outcome = self._telling.conclude(self._coordinator.reason, self._hands.failure)
        self._diary.close()
        self._front.send(outcome)

    # --- going on ---

    def _go_on(self, begin: messages.Begin, channels: dict[Whose, int]) -> set[str]:
        """Come to where the launcher before this one was; what it had told that the user has not seen until now."""
        shown = self._telling.recorder.show_since(begin.shown)
        self._hearing.go_on(self._processes.alive, channels)
        self._telling.add_process("launcher", os.getpid())
        if self._info.status == "running":
            self._telling.started()
        return {record.text for record in shown if isinstance(record, events.Notice)}

    def _tell_of_launchers(self, deaths: Sequence[str], told: set[str]) -> None:
        for text in deaths:
            if any(other.startswith(text) for other in told):
                continue
            text += f"; another (pid {os.getpid()}) goes on from {self._telling.directory}"
            text += "; training went on meanwhile" if self._info.status == "running" else ""
            self._telling.note_now("died", text, "launcher", 0)

    # --- the loop ---

    def _turn(self) -> None:
        for whose in self._channels.ready(_TICK_S):
            if whose[0] == "front":
                self._heed(self._front.drain())
            else:
                self._hearing.hear(whose)
        self._hearing.shorten(self._saver.saved)
        self._saver.turn()
        if self._saver.saved > self._dropped:
            self._dropped = self._saver.saved
            self._front.send(messages.Drop(self._dropped))
        self._control.turn(self._answer)
        self._telling.recorder.flush()
        self._telling.show_output()
        self._look_after()
        if self._processes.are_late:
            self._kill_all()

    def _heed(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """What the front has said."""
        for message, _ in said:
            match message:
                case messages.Interrupt(times=times) if times > self._interrupts:
                    self._hearing.note("front", message)
                case messages.Exited(pid=pid, status=status):
                    self._zygote_ended(pid, status)
                case messages.Abandon(reason=reason):
                    self._kill_all()
                    self._telling.recorder.abandon(reason)
                    sys.exit(1)

    def _take(self, entry: Entry, message: messages.Any, descriptors: tuple[int, ...]) -> None:
        role, rank = entry.role, entry.rank
        match message:
            case messages.Part():
                self._take_part(rank, message, descriptors)
            case messages.Kept(rank=newcomer):
                self._channels.send(("worker", newcomer), message, descriptors)
                for fd in descriptors:
                    os.close(fd)
            case messages.Alarm(text=text):
                self._telling.note("alarm", text)
            case messages.Reads():
                if text := self._readings.take(rank, message):
                    self._telling.note("alarm", text)
            case messages.Ready(versions=versions):
                self._info.versions = versions
                self._processes.fork_first(self._job.servers, self._job.workers)
            case messages.Forked(role=whose, rank=its, pid=pid):
                self._forked(whose, its, pid, descriptors)
            case messages.Exited(role=whose, rank=its, pid=pid, status=status):
                self._exited(whose, its, pid, status, left=self._has_left(entry, whose, its))
            case messages.Steps(rows=rows):
                self._merger.add(rows, rank)
                self._lookout.steps_took(seconds_a_step(rows))
                self._coordinator.handle(Came(role, rank, message))
            case messages.Logged(step=step, values=values):
                self._merger.log(step, values)
            case messages.LoggedBehind(epoch=epoch, loss=loss, samples=samples, values=values):
                self._merger.log_behind(epoch, rank, loss, samples, values)
            case messages.Scale():
                self._scale(message)
            case messages.Joined():
                if role == "worker":
                    self._saver.joined(rank)
                self._hands.do(self._coordinator.handle(Came(role, rank, message)))
            case messages.Pass(number=number, steps=steps):
                self._wishes.epoch = number + 1
                self._telling.record(events.Epoch(self._telling.at_s, number + 1, steps))
            case messages.Interrupt(times=times):
                self._interrupted(times)
            case _:
                self._hands.do(self._coordinator.handle(Came(role, rank, message)))

    def _has_left(self, entry: Entry, role: str, rank: int) -> bool:
        """Was it finished with the script when it ended? One that has not joined looks as if it were."""
        return role == "worker" and rank in entry.left and rank not in self._coordinator.coming

    def _take_part(self, rank: int, part: messages.Part, descriptors: tuple[int, ...]) -> None:
        """Of a checkpoint. The front has it until the checkpoint is written."""
        own = "state" not in msgspec.msgpack.decode(part.layout)[1]
        if descriptors:
            self._front.send(messages.Hold(PARTS[not own], "worker", rank, part.number), descriptors)
            self._saver.take(rank, part, descriptors[0])
        elif (rank, part.number, own) in self._parts:
            self._saver.take(rank, part, self._parts.pop((rank, part.number, own)))

    def _forked(self, role: str, rank: int, pid: int, descriptors: tuple[int, ...]) -> None:
        if descriptors:
            self._front.send(messages.Hold("channel", role, rank), descriptors)
            self._channels.open((role, rank), descriptors[0])
        if role == "server":
            for memory, fd in self._memories.of_exchanges():
                self._channels.send((role, rank), memory, (fd,))
            if self._hands.done:  # while it was forked
                self._channels.send((role, rank), FINISHED)
        self._processes.forked(role, rank, pid)
        self._telling.add_process(role, pid, rank)
        if not self._processes.are_there:
            return
        is_first = self._info.status != "running"
        self._info.status = "running"
        self._telling.write_info()
        if is_first:
            self._telling.started()

    def _exited(self, role: str, rank: int, pid: int, status: int, *, left: bool) -> None:
        self._channels.close((role, rank))
        if role == "worker":
            self._saver.lost(rank, finished=status == 0)
            self._telling.merger.left(rank)
        self._processes.ended(role, rank)
        if left:  # it had no time to say so
            self._hands.do(self._coordinator.handle(Came(role, rank, messages.Finished())))
            self._board.wake_all()  # nor to ring
        effects = self._coordinator.handle(Died(role, rank, pid, status))
        if GiveUp(rank) in effects:
            self._saver.lost(rank, finished=True)  # nor is a part of it in any checkpoint from now on
        self._hands.do(effects)

    def _answer(self, question: messages.Any) -> messages.Any:
        """To a user, see control.py; or to whoever starts servers elsewhere, and cannot."""
        if isinstance(question, messages.Failed):
            self._hearing.note("launcher", question)
            return messages.Scaled()
        if not isinstance(question, messages.Scale):
            return messages.Scaled(kind="UsageError", what=f"a run does not answer {type(question).__name__}")
        if self._info.status != "running" or self._hands.failure is not None:
            return messages.Scaled(kind="UsageError", what="the run is just beginning, or ending", fix="try again")
        answer = self._wishes.answer(question)
        if answer.kind or (question.workers is None and question.servers is None):
            return answer
        try:
            for rank in range(self._coordinator.wanted, question.workers or 0):
                self._memories.reserve_place(rank)
        except errors.HostError as error:
            return messages.Scaled(kind="HostError", what=error.what, why=error.why, fix=error.fix)
        self._hearing.note("launcher", question)
        return answer

    def _scale(self, wish: messages.Scale) -> None:
        """Of a wish that is not refused."""
        for text in self._wishes.answer(wish).told:
            self._telling.note("scale", text)
        if wish.workers is not None:
            threads = self._job.threads_at_home(len(os.sched_getaffinity(0)), wish.workers)
            setup = msgspec.msgpack.decode(self._processes.setup, type=Setup)
            self._processes.setup = msgspec.msgpack.encode(msgspec.structs.replace(setup, threads=threads))
            if not self._channels.silent:
                self._board.want(wish.workers)
        self._hands.do(self._coordinator.handle(Wished(wish.workers, wish.servers)))
        self._hands.tell_numbers()

    # --- stopping ---

    def _look_after(self) -> None:
        """Kill processes that do not get on: their deaths are then told, and mended, as any other's."""
        now_s = time.monotonic()
        if not self._lookout.is_due(now_s):
            return
        self._memories.mend()  # who takes the lock does so, but for one who cannot
        if self._hands.failure is not None or self._interrupts:
            return
        alive = self._processes.alive
        for whose, what in self._lookout.stuck(alive, now_s):
            role, rank = whose
            self._telling.note_now("stuck", f"{role} {rank} (pid {alive[whose]}) {what}: it is killed", role, rank)
            os.kill(alive[whose], signal.SIGKILL)

    def _interrupted(self, times: int) -> None:
        """Ctrl-C or SIGTERM: first, let the round finish; second, now."""
        self._interrupts = max(times, self._interrupts)
        self._board.set_interrupt()
        self._hands.do(self._coordinator.handle(Interrupted()))
        self._processes.end_within(_INTERRUPT_S if times == 1 else 0.0)

    def _kill_all(self) -> None:
        if self._interrupts:
            self._hands.fail("launcher", 0, _INTERRUPTED)
        self._processes.kill_all()

    def _zygote_ended(self, pid: int, status: int) -> None:
        what = f"the process that forks workers (pid {pid}) {how_ended(status)}"
        self._hands.fail("zygote", 0, messages.Failed("HostError", what))
        self._processes.give_up()
