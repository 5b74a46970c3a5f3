"""The local engine: the launcher of a run on this machine, and its coordinator's hands and eyes.

It starts the zygote, has workers and servers forked, carries messages to the pure ``Coordinator`` and does what that
says, watches every process, and records what happens. It holds no lock and runs one loop.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec

from paceline import config_file, errors, events
from paceline.config import Job
from paceline.engine import allocator, resume_from
from paceline.engine.checkpoints import Checkpoints, Loaded
from paceline.engine.metrics import Merger, seconds_a_step
from paceline.engine.program import Call, Script
from paceline.engine.recorder import Recorder
from paceline.engine.saver import Saver
from paceline.engine.setup import Setup, encode_job
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
_ZYGOTE = "import sys; sys.path.append({root!r}); from paceline.engine.zygote import main; main({fd})"


def run_local(
    job: Job,
    program: Script | Call,
    *,
    watch: Callable[[events.Record], None],
    argv: Sequence[str] = (),
    resume: Loaded | None = None,
) -> events.Summary:
    """Run ``program`` with ``job.workers`` workers on this machine; blocks until all processes have ended.

    ``resume``: go on from this checkpoint, in the directory of the run that made it.

    ``watch`` sees every record, in this thread. Raises a PacelineError (ScriptError with the user's traceback,
    Interrupted at Ctrl-C, ...) when the run has failed and everything has stopped.
    """
    if not sys.platform.startswith("linux"):
        raise errors.HostError(
            f"distributed runs need Linux; this is {sys.platform}", fix="run the script alone: python SCRIPT"
        )
    going_on = None if resume is None else (resume.path.parent.parent, resume.step)
    recorder = Recorder(job, watch, argv, going_on)
    return _Launcher(job, program, recorder, resume).run()


class _Launcher:
    def __init__(self, job: Job, program: Script | Call, recorder: Recorder, resume: Loaded | None) -> None:
        self._job, self._program, self._recorder, self._resume = job, program, recorder, resume
        # Who has data that nobody else has, or reads it for all, cannot be replaced.
        restarts = 0 if job.data == "served" else job.restarts
        self._coordinator = Coordinator(job.workers, job.servers, restarts=restarts, min_workers=job.min_workers)
        self._memories: dict[int, tuple[messages.Memory, int]] = {}  # what newcomers get, by number
        self._started_s = time.monotonic() - recorder.offset_s
        state = resume.documents["state"] if resume is not None else None
        after = 0 if state is None else resume_from.last_key(state, job)
        self._merger = Merger(self._started_s, after=after, steps=0 if state is None else state["step"])
        checkpoints = Checkpoints(recorder.directory, job.keep)
        self._saver = Saver(checkpoints, job.workers, lambda kind, text: self._notice(kind, text))
        self._selector = selectors.DefaultSelector()
        self._channels: dict[tuple[str, int], Channel] = {}
        self._alive: dict[tuple[str, int], int] = {}
        self._expected = job.workers + job.servers
        self._failure: tuple[str, int, messages.Failed] | None = None
        self._kill_at_s: float | None = None
        self._interrupts = 0
        self._watch, self._looked_s = Watch(job.hang_timeout), 0.0
        self._log: _Tail | None = None
        self._zygote: subprocess.Popen[bytes] | None = None

    def run(self) -> events.Summary:
        """The whole life of the run."""
        board_fd = Board.create(self._job.workers, self._job.servers)
        self._board = Board(segment.attach(board_fd))
        self._steps = StepTimes(self._board.longest_ns)
        self._lock = Lock(board_fd, self._board.journal)
        if self._resume is not None:
            resume_from.fill_board(self._resume.documents["state"], self._board, self._job)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        script = self._program if isinstance(self._program, Script) else None
        self._recorder.write_config(
            config_file.dump(self._job, str(script.path) if script else None, script.args if script else ())
        )
        try:
            for number in before if _in_main_thread() else ():
                signal.signal(number, self._interrupted)
            self._start(board_fd)
            while self._alive or self._expected:
                self._turn()
        except BaseException as error:
            # Not the run's fault but the watcher's (a closed pipe, say): nobody is left behind all the same.
            self._kill_all()
            self._recorder.abandon(repr(error))
            raise
        finally:
            for number, handler in before.items() if _in_main_thread() else ():
                signal.signal(number, handler)
            self._stop_zygote()
            for _, fd in self._memories.values():
                os.close(fd)
            self._saver.close()
            os.close(board_fd)
        return self._conclude()

    # --- starting ---

    def _start(self, board_fd: int) -> None:
        mine, its = Channel.pair()
        os.set_inheritable(its.fileno(), True)
        root = str(Path(__file__).resolve().parent.parent.parent)
        threads = self._threads()
        self._zygote = subprocess.Popen(
            [sys.executable, "-P", "-c", _ZYGOTE.format(root=root, fd=its.fileno())],
            pass_fds=(its.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ
            | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
            | allocator.settings(os.environ),
        )
        its.close()
        self._channels["zygote", 0] = mine
        self._selector.register(mine, selectors.EVENT_READ, ("zygote", 0))
        self._setup = msgspec.msgpack.encode(self._describe(threads))
        self._board_fd = board_fd

    def _threads(self) -> int:
        return self._job.threads or max(1, len(os.sched_getaffinity(0)) // self._job.workers)

    def _describe(self, threads: int) -> Setup:
        program = self._program
        return Setup(
            job=encode_job(self._job),
            directory=str(self._recorder.directory.resolve()),
            threads=threads,
            script=str(program.path) if isinstance(program, Script) else "",
            args=program.args if isinstance(program, Script) else (),
            call=program.main if isinstance(program, Call) else None,
            resume=str(self._resume.path.resolve()) if self._resume is not None else "",
        )

    def _fork_all(self) -> None:
        log = self._recorder.directory / "logs" / "worker-0.log"
        shown = log.stat().st_size if log.exists() else 0  # of the run that is resumed
        for role, count in (("server", self._job.servers), ("worker", self._job.workers)):
            for rank in range(count):
                self._fork(role, rank)
        self._log = _Tail(log, shown)

    def _fork(self, role: str, rank: int) -> None:
        mine, its = Channel.pair()
        path = self._recorder.directory / "logs" / f"{role}-{rank}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        payload = self._payload() if role == "worker" else None
        descriptors = [its.fileno(), self._board_fd, log, *(() if payload is None else (payload,))]
        self._send(self._channels["zygote", 0], messages.Fork(role, rank, self._setup), tuple(descriptors))
        its.close()
        for fd in (log, payload):
            if fd is not None:
                os.close(fd)
        self._channels[role, rank] = mine
        self._selector.register(mine, selectors.EVENT_READ, (role, rank))

    def _payload(self) -> int | None:
        if not isinstance(self._program, Call):
            return None
        fd = os.memfd_create("paceline-call", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as data:
            data.write(self._program.payload)
        return fd

    # --- the loop ---

    def _turn(self) -> None:
        for key, _ in self._selector.select(_TICK_S):
            role, rank = key.data
            channel = self._channels.get((role, rank))
            if channel is not key.fileobj:
                continue  # its process has ended, which an event before this one told; another may have its place
            try:
                arrived = channel.drain()
            except Closed:
                self._selector.unregister(channel)
                channel.close()
                del self._channels[role, rank]
                if role == "zygote":
                    self._zygote_died()
                continue
            for message, descriptors in arrived:
                self._take(role, rank, message, descriptors)
        self._saver.turn()
        for metric in self._merger.ready():
            self._recorder.take(metric)
        self._recorder.flush()
        self._show_output()
        self._look_after()
        if self._kill_at_s is not None and time.monotonic() > self._kill_at_s:
            self._kill_all()

    def _take(self, role: str, rank: int, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        match message:
            case messages.Part():
                self._saver.take(rank, message, descriptors[0])
            case messages.Alarm(text=text):
                self._saver.failed(text)
            case messages.Ready(versions=versions):
                self._recorder.info.versions = versions
                self._fork_all()
            case messages.Forked(role=whose, rank=its, pid=pid):
                self._forked(whose, its, pid)
            case messages.Exited(role=whose, rank=its, pid=pid, status=status):
                self._exited(whose, its, pid, status)
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

    def _forked(self, role: str, rank: int, pid: int) -> None:
        self._alive[role, rank] = pid
        self._expected -= 1
        host = str(self._recorder.info.machines[0]["host"])
        self._recorder.info.processes.append(events.Process(role, rank, pid, host))
        info = self._recorder.info
        if self._expected == 0 and info.status == "running":
            self._recorder.write_info()
        elif self._expected == 0:
            info.status = "running"
            info.processes.insert(0, events.Process("launcher", 0, os.getpid(), host))
            self._recorder.write_info()
            self._recorder.take(events.Started(str(self._recorder.directory), info.processes))

    def _exited(self, role: str, rank: int, pid: int, status: int) -> None:
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
        self._obey(self._coordinator.handle(Died(role, rank, pid, status)))

    def _obey(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Allocate(request=request, servers=servers):
                    self._allocate(request, servers)
                case Give(rank=rank, number=number):
                    memory, fd = self._memories[number]
                    self._send(self._channels["worker", rank], memory, (fd,))
                case Replace(rank=rank, role="server"):
                    self._expected += 1
                    self._fork("server", rank)
                    for memory, fd in self._memories.values():
                        if memory.kind == "exchange":
                            self._send(self._channels["server", rank], memory, (fd,))
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
                    for (role, _), channel in self._channels.items():
                        if role == "server":
                            self._send(channel, messages.Stop("all workers have finished"))
                    self._board.wake_all()

    def _tell_death(self, rank: int, *, for_good: bool) -> None:
        self._lock.try_to_mend()
        self._board.tell_death(rank, for_good=for_good)
        self._merger.lost(rank)

    def _allocate(self, request: messages.Wrap, servers: bool) -> None:
        try:
            fd = segment.create(request.what, request.size_bytes)
        except errors.HostError as error:
            failure = messages.Failed("HostError", error.what, error.why, error.fix)
            self._obey(self._coordinator.handle(Came("launcher", 0, failure)))  # it must know why workers leave
            return
        memory = messages.Memory(request.number, request.size_bytes, request.kind, request.spec)
        # Servers first: they are ready when the first push comes.
        for role in ("server", "worker") if servers else ("worker",):
            for (whose, _), channel in self._channels.items():
                if whose == role:
                    self._send(channel, memory, (fd,))
        self._memories[request.number] = memory, fd
        self._board.journal.map(request.number, memoryview(segment.attach(fd)).cast("Q"))
        if request.kind == "exchange":
            optimizer, _, rest = request.what.partition(" over ")
            record = events.Wrapped(self._now(), int(rest.split()[0]), request.size_bytes, optimizer)
            self._recorder.take(record)

    def _send(self, channel: Channel, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        try:
            channel.send(message, descriptors)
        except Closed:
            return  # its end is reported by the zygote, with the reason

    # --- stopping ---

    def _abort(self, role: str, rank: int, failure: messages.Failed) -> None:
        self._failure = self._failure or (role, rank, failure)  # what we kill dies of us
        self._board.set_abort()
        for (whose, _), channel in self._channels.items():
            if whose != "zygote":
                self._send(channel, messages.Stop(failure.what))
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

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C or SIGTERM: first, let the round finish; second, now."""
        self._interrupts += 1
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

    def _zygote_died(self) -> None:
        assert self._zygote is not None
        status = self._zygote.wait()
        if self._failure is None:
            what = f"the process that forks workers (pid {self._zygote.pid}) {how_ended(status)}"
            failure = messages.Failed("HostError", what)
            self._failure = ("zygote", 0, failure)
        self._alive.clear()
        self._expected = 0

    def _stop_zygote(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._selector.close()
        if self._zygote is not None:
            try:
                self._zygote.wait(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()

    # --- reporting ---

    def _notice(self, kind: str, text: str) -> None:
        self._recorder.take(events.Notice(self._now(), kind, text))

    def _now(self) -> float:
        return round(time.monotonic() - self._started_s, 6)

    def _show_output(self, *, last: bool = False) -> None:
        text = self._log.read(last=last) if self._log else ""
        if text:
            self._recorder.take(events.Output(text))

    def _conclude(self) -> events.Summary:
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
            return self._recorder.close("done", self._coordinator.reason, 0, begun_s)
        role, rank, failure = self._failure
        error = _error(failure)
        if failure.traceback:
            log = self._recorder.directory / "logs" / f"{role}-{rank}.log"
            with log.open("a") as lines:
                lines.write(failure.traceback)
        status = "interrupted" if isinstance(error, errors.Interrupted) else "failed"
        self._recorder.close(status, error.what, error.exit_code, begun_s)
        raise error


def _error(failure: messages.Failed) -> errors.PacelineError:
    kind = getattr(errors, failure.kind, errors.PacelineError)
    if kind is errors.ScriptError:
        return errors.ScriptError(failure.what, why=failure.why, fix=failure.fix, traceback=failure.traceback)
    assert issubclass(kind, errors.PacelineError)
    return kind(failure.what, why=failure.why, fix=failure.fix)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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
