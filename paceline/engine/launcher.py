"""The launcher of a run on this machine: its coordinator's hands and eyes. A process of its own (``engine/front.py``).

It has workers and servers forked by the zygote, carries messages to the pure ``Coordinator`` and does what that says,
watches every process, and records what happens. It holds no lock and runs one loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from paceline import errors, events
from paceline.engine.checkpoints import Checkpoints
from paceline.engine.metrics import Merger, seconds_a_step
from paceline.engine.recorder import Recorder
from paceline.engine.saver import Saver
from paceline.engine.setup import Setup, decode_job
from paceline.engine.watch import StepTimes, Watch
from paceline.protocol import messages
from paceline.protocol.coordinator import (
    Abort,
    Allocate,
    Came,
    Coordinator,
    Died,
    Done,
    Effect,
    Give,
    GiveUp,
    Interrupted,
    Replace,
    Tell,
    how_ended,
)
from paceline.protocol.rounds import LEFT
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel, Closed
from paceline.transport.lock import Lock

_TICK_S = 0.05
_LOOK_S = 0.2  # how often processes are looked after
_GRACE_S = 2.0  # between telling processes to stop and killing them
_INTERRUPT_S = 10.0  # between Ctrl-C and the same
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Launch what the front behind ``descriptor`` says, to its end; end when the front does."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides what Ctrl-C means
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
        self._front, self._setup = front, begin.setup
        setup = msgspec.msgpack.decode(begin.setup, type=Setup)
        job = self._job = decode_job(setup.job)
        resume = begin.steps if begin.resumed else None
        self._recorder = recorder = Recorder(job, Path(begin.directory), self._show, begin.argv, resume)
        recorder.info.processes.append(_process("front", begin.front))
        recorder.info.processes.append(_process("launcher", os.getpid()))
        self._shown_output = begin.shown.get("output", 0)
        # Who has data that nobody else has, or reads it for all, cannot be replaced.
        restarts = 0 if job.data == "served" else job.restarts
        self._coordinator = Coordinator(job.workers, job.servers, restarts=restarts, min_workers=job.min_workers)
        self._memories: dict[int, tuple[messages.Memory, int]] = {}  # what newcomers get, by number
        self._started_s = time.monotonic() - recorder.offset_s
        self._merger = Merger(self._started_s, after=begin.after, steps=begin.steps)
        checkpoints = Checkpoints(recorder.directory, job.keep)
        self._saver = Saver(checkpoints, job.workers, lambda kind, text: self._notice(kind, text))
        self._selector = selectors.DefaultSelector()
        self._channels: dict[tuple[str, int], Channel] = {}
        self._alive: dict[tuple[str, int], int] = {}
        self._expected = job.workers + job.servers
        self._exits: deque[messages.Exited] = deque()  # that nothing has followed from yet
        self._failure: tuple[str, int, messages.Failed] | None = None
        self._kill_at_s: float | None = None
        self._interrupts = 0
        self._watch, self._looked_s = Watch(job.hang_timeout), 0.0
        self._log: _Tail | None = None
        self._births: dict[tuple[str, int], int] = {}
        self._payload: int | None = None
        self._selector.register(front, selectors.EVENT_READ, ("front", 0))
        for hold, fd in held:
            self._take_over(hold, fd)

    def _take_over(self, hold: messages.Hold, fd: int) -> None:
        """What the front keeps."""
        match hold.what:
            case "board":
                self._board_fd = fd
                self._board = Board(segment.attach(fd))
                self._steps = StepTimes(self._board.longest_ns)
                self._lock = Lock(fd, self._board.journal)
            case "payload":
                self._payload = fd
            case "channel":
                self._open(hold.role, hold.rank, fd)

    def _open(self, role: str, rank: int, fd: int) -> None:
        channel = self._channels[role, rank] = Channel(socket.socket(fileno=fd))
        self._selector.register(channel, selectors.EVENT_READ, (role, rank))

    def run(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """The whole life of the run. ``said``: what the front has said since."""
        self._heed(said)
        while self._alive or self._expected:
            self._turn()
        self._saver.close()
        summary, failure = self._conclude()
        self._front.send(messages.Outcome(msgspec.json.encode(summary), failure))

    # --- starting ---

    def _fork_all(self) -> None:
        for role, count in (("server", self._job.servers), ("worker", self._job.workers)):
            for rank in range(count):
                self._fork(role, rank)

    def _fork(self, role: str, rank: int) -> None:
        birth = self._births[role, rank] = self._births.get((role, rank), 0) + 1
        path = self._recorder.directory / "logs" / f"{role}-{rank}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        payload = (self._payload,) if role == "worker" and self._payload is not None else ()
        self._send("zygote", 0, messages.Fork(role, rank, self._setup, birth), (self._board_fd, log, *payload))
        os.close(log)

    # --- the loop ---

    def _turn(self) -> None:
        for key, _ in self._selector.select(_TICK_S):
            role, rank = key.data
            if role == "front":
                self._heed(self._front.drain())
                continue
            channel = self._channels.get((role, rank))
            if channel is not key.fileobj:
                continue  # its process has ended, which an event before this one told; another may have its place
            try:
                arrived = channel.drain()
            except Closed:
                self._selector.unregister(channel)
                channel.close()
                del self._channels[role, rank]
                continue
            for message, descriptors in arrived:
                self._take(role, rank, message, descriptors)
        # What they left half done is undone first: one killed while it was leaving has not left.
        while self._exits and self._is_whole():
            self._exited(self._exits.popleft())
        self._saver.turn()
        for metric in self._merger.ready():
            self._recorder.take(metric)
        self._recorder.flush()
        self._show_output()
        self._look_after()
        if self._kill_at_s is not None and time.monotonic() > self._kill_at_s:
            self._kill_all()

    def _heed(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """What the front has said."""
        for message, _ in said:
            match message:
                case messages.Interrupt(times=times):
                    self._interrupted(times)
                case messages.Exited(pid=pid, status=status):
                    self._zygote_ended(pid, status)
                case messages.Abandon(reason=reason):
                    self._kill_all()
                    self._recorder.abandon(reason)
                    sys.exit(1)

    def _take(self, role: str, rank: int, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        match message:
            case messages.Part():
                self._saver.take(rank, message, descriptors[0])
            case messages.Kept(rank=newcomer):
                if ("worker", newcomer) in self._channels:
                    self._send("worker", newcomer, message, descriptors)
                for fd in descriptors:
                    os.close(fd)
            case messages.Alarm(text=text):
                self._saver.failed(text)
            case messages.Ready(versions=versions):
                self._recorder.info.versions = versions
                self._fork_all()
            case messages.Forked(role=whose, rank=its, pid=pid):
                self._forked(whose, its, pid, descriptors[0])
            case messages.Exited():
                self._exits.append(message)
            case messages.Steps(rows=rows):
                self._merger.add(rows, rank)
                self._steps.add(seconds_a_step(rows))
                self._coordinator.handle(Came(role, rank, message))
            case messages.Logged(step=step, values=values):
                self._merger.log(step, values)
            case messages.Pass(number=number, steps=steps):
                self._recorder.take(events.Epoch(self._now(), number + 1, steps))
            case _:
                self._obey(self._coordinator.handle(Came(role, rank, message)))

    def _forked(self, role: str, rank: int, pid: int, channel: int) -> None:
        self._front.send(messages.Hold("channel", role, rank), (channel,))
        self._open(role, rank, channel)
        if role == "server":
            for memory, fd in self._memories.values():
                if memory.kind == "exchange":
                    self._send(role, rank, memory, (fd,))
        self._alive[role, rank] = pid
        self._expected -= 1
        info = self._recorder.info
        info.processes.append(_process(role, pid, rank))
        if self._expected == 0 and info.status == "running":
            self._recorder.write_info()
        elif self._expected == 0:
            info.status = "running"
            self._recorder.write_info()
            self._log = _Tail(self._recorder.directory / "logs" / "worker-0.log", self._shown_output)
            self._recorder.take(events.Started(str(self._recorder.directory), info.processes))

    def _is_whole(self) -> bool:
        """Is nothing half done under the run's lock?"""
        if not self._board.journal.is_clean:
            self._lock.try_to_mend()
        return self._board.journal.is_clean

    def _exited(self, ended: messages.Exited) -> None:
        role, rank, pid, status = ended.role, ended.rank, ended.pid, ended.status
        # What it said before it ended comes first: a traceback explains more than an exit status.
        channel = self._channels.pop((role, rank), None)
        if channel is not None:
            self._selector.unregister(channel)
            try:
                while True:
                    for message, descriptors in channel.drain():
                        self._take(role, rank, message, descriptors)
            except Closed:
                channel.close()
        if role == "worker":
            self._saver.lost(rank, finished=status == 0)
        self._alive.pop((role, rank), None)
        if role == "worker" and self._board.gone[rank] == LEFT:  # it had no time to say so
            self._obey(self._coordinator.handle(Came(role, rank, messages.Finished())))
            self._board.wake_all()  # nor to ring
        self._obey(self._coordinator.handle(Died(role, rank, pid, status)))

    def _obey(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Allocate(request=request, servers=servers):
                    self._allocate(request, servers)
                case Give(rank=rank, number=number):
                    memory, fd = self._memories[number]
                    self._send("worker", rank, memory, (fd,))
                case Replace(rank=rank, role="server"):
                    self._expected += 1
                    self._fork("server", rank)
                case Replace(rank=rank):
                    self._tell_death(rank, for_good=False)
                    self._expected += 1
                    self._fork("worker", rank)
                case GiveUp(rank=rank):
                    self._tell_death(rank, for_good=True)
                case Tell(kind=kind, text=text, role=role, rank=rank):
                    self._recorder.take(events.Notice(self._now(), kind, text, role, rank))
                case Abort(role=role, rank=rank, failure=failure):
                    self._abort(role, rank, failure)
                case Done():
                    self._send_all(("server",), messages.Stop("all workers have finished"))
                    self._board.wake_all()

    def _tell_death(self, rank: int, *, for_good: bool) -> None:
        self._lock.try_to_mend()
        self._board.tell_death(rank, for_good=for_good)
        self._merger.lost(rank)

    def _allocate(self, request: messages.Wrap, servers: bool) -> None:
        try:
            fd = segment.create(request.what, request.size_bytes)
            mapped = segment.attach(fd)
        except errors.HostError as error:
            failure = messages.Failed("HostError", error.what, error.why, error.fix)
            self._obey(self._coordinator.handle(Came("launcher", 0, failure)))  # it must know why workers leave
            return
        memory = messages.Memory(request.number, request.size_bytes, request.kind, request.spec)
        self._front.send(messages.Hold("memory", number=request.number, about=msgspec.msgpack.encode(memory)), (fd,))
        # Servers first: they are ready when the first push comes.
        self._send_all(("server", "worker") if servers else ("worker",), memory, (fd,))
        self._memories[request.number] = memory, fd
        self._board.journal.map(request.number, memoryview(mapped).cast("Q"))
        if request.kind == "exchange":
            optimizer, _, rest = request.what.partition(" over ")
            record = events.Wrapped(self._now(), int(rest.split()[0]), request.size_bytes, optimizer)
            self._recorder.take(record)

    def _send(self, role: str, rank: int, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        channel = self._channels.get((role, rank))
        if channel is not None:
            with contextlib.suppress(Closed):  # its end is reported by the zygote, with the reason
                channel.send(message, descriptors)

    def _send_all(self, roles: Sequence[str], message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        for role in roles:
            for whose, rank in self._channels:
                if whose == role:
                    self._send(role, rank, message, descriptors)

    # --- stopping ---

    def _abort(self, role: str, rank: int, failure: messages.Failed) -> None:
        self._failure = self._failure or (role, rank, failure)  # what we kill dies of us
        self._board.set_abort()
        self._send_all(("server", "worker"), messages.Stop(failure.what))
        self._kill_at_s = min(self._kill_at_s or 2**62, time.monotonic() + _GRACE_S)

    def _look_after(self) -> None:
        """Kill processes that do not get on: their deaths are then told, and mended, as any other's."""
        now_s = time.monotonic()
        if now_s < self._looked_s + _LOOK_S:
            return
        self._looked_s = now_s
        if not self._board.journal.is_clean:
            self._lock.try_to_mend()  # who takes the lock does so, but for one who cannot
        if self._failure is not None or self._interrupts:
            return
        for whose, what in self._watch.look(self._alive, now_s, self._hangs, self._in_hand, self._steps):
            role, rank = whose
            text = f"{role} {rank} (pid {self._alive[whose]}) {what}: it is killed"
            self._recorder.take(events.Notice(self._now(), "stuck", text, role, rank))
            os.kill(self._alive[whose], signal.SIGKILL)

    def _hangs(self, role: str, rank: int) -> bool:
        """Do others wait, and this one not for them?"""
        member = rank if role == "worker" else self._job.workers + rank
        asleep = self._board.asleep
        return not asleep[member] and any(asleep[w] for w in range(self._job.workers))

    def _in_hand(self, role: str, rank: int) -> int:
        return self._board.in_hand[rank] if role == "worker" else 0

    def _interrupted(self, times: int) -> None:
        """Ctrl-C or SIGTERM: first, let the round finish; second, now."""
        self._interrupts = times
        self._coordinator.handle(Interrupted())
        self._board.set_interrupt()
        wait_s = _INTERRUPT_S if self._interrupts == 1 else 0.0
        self._kill_at_s = min(self._kill_at_s or 2**62, time.monotonic() + wait_s)

    def _kill_all(self) -> None:
        self._kill_at_s = None
        if self._failure is None and self._interrupts:
            self._failure = ("launcher", 0, messages.Failed("Interrupted", "stopped by Ctrl-C"))
        if self._expected:
            self._expected = 0
            self._alive.clear()  # the zygote is still importing: it is all there is to stop
            return
        for pid in self._alive.values():
            os.kill(pid, signal.SIGKILL)

    def _zygote_ended(self, pid: int, status: int) -> None:
        if self._failure is None:
            failure = messages.Failed("HostError", f"the process that forks workers (pid {pid}) {how_ended(status)}")
            self._failure = ("zygote", 0, failure)
        self._alive.clear()
        self._expected = 0

    # --- reporting ---

    def _show(self, file: str, place: int, records: list[events.Record]) -> None:
        self._front.send(messages.Show(file, place, msgspec.msgpack.encode(records)))

    def _notice(self, kind: str, text: str) -> None:
        self._recorder.take(events.Notice(self._now(), kind, text))

    def _now(self) -> float:
        return round(time.monotonic() - self._started_s, 6)

    def _show_output(self, *, last: bool = False) -> None:
        text = self._log.read(last=last) if self._log else ""
        if text:
            self._recorder.take(events.Output(text))

    def _conclude(self) -> tuple[events.Summary, messages.Failed | None]:
        for metric in self._merger.ready(everything=True):
            self._recorder.take(metric)
        for worker, dropped in sorted(self._merger.dropped.items()):
            text = f"worker {worker} was late {dropped} {'time' if dropped == 1 else 'times'}: its samples came again"
            self._recorder.take(events.Notice(self._now(), "late", text, "worker", worker))
        self._show_output(last=True)
        if self._log is not None:
            self._log.close()
        begun_s = (self._merger.begun_s or self._started_s) - self._started_s
        if self._failure is None and self._interrupts:
            self._failure = ("launcher", 0, messages.Failed("Interrupted", "stopped by Ctrl-C"))
        if self._failure is None:
            return self._recorder.close("done", self._coordinator.reason, 0, begun_s), None
        role, rank, failure = self._failure
        if failure.traceback:
            log = self._recorder.directory / "logs" / f"{role}-{rank}.log"
            with log.open("a") as lines:
                lines.write(failure.traceback)
        status = "interrupted" if failure.kind == "Interrupted" else "failed"
        exit_code = getattr(errors, failure.kind, errors.PacelineError).exit_code
        return self._recorder.close(status, failure.what, exit_code, begun_s), failure


def _process(role: str, pid: int, rank: int = 0) -> events.Process:
    return events.Process(role, rank, pid, platform.node())


class _Tail:
    """Reads what a growing text file has got since the last look, in whole lines."""

    def __init__(self, path: Path, start: int) -> None:
        self._file: IO[bytes] = path.open("rb")
        self._file.seek(start)
        self._rest = b""

    def read(self, *, last: bool = False) -> str:
        data = self._rest + self._file.read()
        cut = len(data) if last else data.rfind(b"\n") + 1
        self._rest = data[cut:]
        return data[:cut].decode(errors="replace")

    def close(self) -> None:
        self._file.close()
