"""The front of a run on this machine: the process that the user has started, a terminal's or a program of theirs.

It shows the records of the run, hears Ctrl-C, and keeps a copy of every descriptor that the run is made of: memory, the
ends of channels. What decides is another process, the launcher (``launcher.py``). If that dies, the front starts
another on what it keeps; training goes on meanwhile. The front decides nothing, and when it ends the run ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec

from paceline import config_file, errors, events
from paceline.config import Job
from paceline.engine import allocator
from paceline.engine.checkpoint import resume_from
from paceline.engine.checkpoint.checkpoints import Loaded
from paceline.engine.checkpoint.saver import PARTS
from paceline.engine.launcher import diary
from paceline.engine.launcher.recorder import Recorder, new_directory
from paceline.engine.launcher.watch import Watch
from paceline.engine.program import SERVERS, Call, Elsewhere, Script
from paceline.engine.setup import Door, Setup, encode_job
from paceline.engine.worker.position import trained_before
from paceline.protocol import messages
from paceline.protocol.coordinator import how_ended
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel, Closed

_TICK_MS = 50
_GRACE_S = 2.0  # for a process to end of itself
_LOOK_S = 0.2  # how often the launcher is looked after
_DEATHS = 3  # of launchers that have heard nothing new end the run; so do more, while training does not get on
_MOST_DEATHS = 10
_DEAF_S = 5.0  # between a second Ctrl-C and ending all by force
_START = "import sys; sys.path.append({root!r}); from paceline.engine.launcher.{module} import main; main({fd})"
_Name = tuple[str, str, int, int]  # what, role, rank, number


def run_local(
    job: Job,
    program: Script | Call | Elsewhere,
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
    directory = new_directory(job) if resume is None else resume.path.parent.parent
    return _Front(job, program, directory, watch, argv, resume).run()


class _Front:
    def __init__(
        self,
        job: Job,
        program: Script | Call | Elsewhere,
        directory: Path,
        watch: Callable[[events.Record], None],
        argv: Sequence[str],
        resume: Loaded | None,
    ) -> None:
        self._job, self._directory, self._watch, self._argv = job, directory, watch, argv
        threads = job.threads_at_home(len(os.sched_getaffinity(0)), job.workers)
        self._setup = _describe(job, program, directory, threads, resume)
        self._threads = threads
        self._decoder = msgspec.msgpack.Decoder(list[events.Record])
        self._held: dict[_Name, tuple[messages.Hold, int]] = {}
        self._interrupts = 0
        self._outcome: messages.Outcome | None = None
        self._told_of: list[str] = []  # deaths of launchers that no notice has told of yet
        self._seen: set[type] = set()  # records that come once
        (directory / "logs").mkdir(exist_ok=True)
        (directory / diary.NAME).unlink(missing_ok=True)  # of a run that was killed, and is resumed
        shutil.rmtree(directory / SERVERS, ignore_errors=True)
        log = directory / "logs" / "worker-0.log"
        self._shown = {"output": log.stat().st_size if log.exists() else 0}  # of the run that is resumed
        script = None if isinstance(program, Call) else program
        text = config_file.dump(job, str(script.path) if script else None, script.args if script else ())
        (directory / "config.toml").write_text(text)
        self._make_board(resume)
        if isinstance(program, Call):
            self._keep(messages.Hold("payload"), _in_memory(program.payload))
        elif isinstance(program, Elsewhere):
            self._keep(messages.Hold("payload"), program.report)

    def _make_board(self, resume: Loaded | None) -> None:
        job = self._job
        fd = Board.create(job.workers, job.servers, places=(job.places, job.server_places))
        self._keep(messages.Hold("board"), fd)
        setup = msgspec.msgpack.encode(self._setup)
        self._begin = messages.Begin(setup, str(self._directory), list(self._argv), os.getpid())
        if resume is not None:
            state = resume.documents["state"]
            resume_from.fill_board(state, Board(segment.attach(fd)), self._job)
            after, steps = resume_from.last_key(state, self._job), state["step"]
            self._begin = msgspec.structs.replace(self._begin, resumed=True, after=after, steps=steps)

    def run(self) -> events.Summary:
        """The whole life of the run."""
        with self._hearing():  # to the end: what comes when all is over is no reason to lose how it went
            try:
                self._zygote, channel = _start("zygote", None, self._zygote_environment())
                self._keep(messages.Hold("channel", "zygote"), channel.detach())
                self._launch_until_over()
            finally:
                for _, fd in self._held.values():
                    os.close(fd)
                _await_end(self._zygote)
        (self._directory / diary.NAME).unlink(missing_ok=True)
        assert self._outcome is not None
        if self._outcome.failure is not None:
            raise _error(self._outcome.failure)
        return msgspec.json.decode(self._outcome.summary, type=events.Summary)

    def _zygote_environment(self) -> dict[str, str]:
        settings = allocator.settings(os.environ)
        return {"OMP_NUM_THREADS": str(self._threads), "OPENBLAS_NUM_THREADS": "1"} | settings

    def _launch_until_over(self) -> None:
        """Start launchers until one has come to the run's end."""
        deaths = deaf = written = 0
        trained = self._shown.get("metrics", 0)
        while True:
            died = self._launch()
            if self._outcome is not None:
                return
            got_on, trained = self._shown.get("metrics", 0) > trained, self._shown.get("metrics", 0)
            heard, written = self._diary_bytes() > written, self._diary_bytes()
            deaths = 1 if got_on else deaths + 1
            deaf = 1 if got_on or heard else deaf + 1
            if deaf == _DEATHS or deaths == _MOST_DEATHS or self._interrupts > 1:
                raise self._gave_up(died, deaths)
            self._told_of.append(died)

    def _diary_bytes(self) -> int:
        try:
            return (self._directory / diary.NAME).stat().st_size
        except FileNotFoundError:
            return 0

    def _launch(self) -> str:
        """Have a launcher launch the run, or go on, and serve it until it ends; how it ended."""
        log = self._directory / "logs" / "launcher.log"
        process, end = _start("launcher", log, {})
        channel = Channel(end)
        try:
            for hold, fd in self._held.values():
                channel.send(hold, (fd,))
            channel.send(msgspec.structs.replace(self._begin, shown=self._shown, deaths=self._told_of))
            self._serve(process, channel)
        except Closed:
            pass
        except BaseException as error:
            # Not the run's fault but the watcher's (a closed pipe, say): nobody is left behind all the same.
            self._abandon(channel, repr(error))
            raise
        finally:
            channel.close()
            status = _await_end(process)
        return f"the launcher (pid {process.pid}) {how_ended(status)}"

    def _serve(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        """Do what the launcher asks for, until it closes its end."""
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        said, zygote_told, deaf_s = 0, False, 2.0**62
        watch, looked_s = Watch(math.inf), 0.0
        while True:
            if poll.poll(_TICK_MS):
                for message, descriptors in channel.drain():
                    self._take(message, descriptors)
            if self._interrupts > said:
                said = self._interrupts
                channel.send(messages.Interrupt(said))
                deaf_s = time.monotonic() + _DEAF_S if said > 1 else deaf_s
            status = self._zygote.poll()
            if status is not None and not zygote_told:
                zygote_told = True
                channel.send(messages.Exited("zygote", 0, self._zygote.pid, status))
            now_s = time.monotonic()
            if now_s > looked_s + _LOOK_S:
                looked_s = now_s
                stuck = any(watch.look({("launcher", 0): process.pid}, now_s, lambda role, rank: False))
                if stuck or now_s > deaf_s:
                    process.kill()

    def _take(self, message: messages.Any, descriptors: tuple[int, ...]) -> None:
        match message:
            case messages.Hold():
                self._keep(message, descriptors[0])
            case messages.Show(file=file, place=place, records=records):
                for record in self._decoder.decode(records):
                    self._show(record)
                self._shown[file] = place
            case messages.Drop(number=number):
                for name in [name for name in self._held if name[0] in PARTS and name[3] <= number]:
                    os.close(self._held.pop(name)[1])
            case messages.Outcome():
                self._outcome = message

    def _show(self, record: events.Record) -> None:
        if isinstance(record, events.Started | events.Summary):
            if type(record) in self._seen:
                return  # a launcher that takes over cannot know
            self._seen.add(type(record))
        if isinstance(record, events.Notice) and record.role == "launcher":
            self._told_of = [text for text in self._told_of if not record.text.startswith(text)]
        self._watch(record)

    def _keep(self, hold: messages.Hold, fd: int) -> None:
        name = (hold.what, hold.role, hold.rank, hold.number)
        before = self._held.pop(name, None)
        if before is not None:
            os.close(before[1])
        self._held[name] = hold, fd

    def _abandon(self, channel: Channel, reason: str) -> None:
        with contextlib.suppress(Closed):
            channel.send(messages.Abandon(reason))
            while True:
                for _, descriptors in channel.drain():
                    for fd in descriptors:
                        os.close(fd)

    def _gave_up(self, what: str, deaths: int) -> errors.PacelineError:
        """There is no launcher any more; the run has failed, and its files say so."""
        recorder = Recorder(self._job, self._directory, lambda file, place, records: None, self._argv, again=True)
        recorder.abandon(what)
        if self._interrupts > 1:
            return errors.Interrupted("stopped by Ctrl-C")
        why = f"{deaths} launchers one after the other, and training has not got on in between"
        return errors.HostError(what, why=why, fix=f"its last output is in {self._directory / 'logs' / 'launcher.log'}")

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM, and a terminal that is closed: the first lets the round finish, the second ends it now."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._interrupted) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if number == signal.SIGHUP:
            _leave_terminal()


def _leave_terminal() -> None:
    """Nothing can be written to it any more: an error there would keep the run from being saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _describe(
    job: Job, program: Script | Call | Elsewhere, directory: Path, threads: int, resume: Loaded | None
) -> Setup:
    return Setup(
        job=encode_job(job),
        directory=str(directory.resolve()),
        threads=threads,
        script="" if isinstance(program, Call) else str(program.path),
        args=() if isinstance(program, Call) else program.args,
        call=program.main if isinstance(program, Call) else None,
        resume=str(resume.path.resolve()) if resume is not None else "",
        trained=trained_before(resume.documents["state"], job) if resume is not None else (),
        door=_door(program) if isinstance(program, Elsewhere) else None,
    )


def _door(program: Elsewhere) -> Door:
    ports, server_ports = list(program.ports), list(program.server_ports)
    return Door(program.host, ports, program.job, program.starter, program.insecure, server_ports)


def _start(module: str, log: Path | None, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process of ours, in a session of its own; it and the other end of its socket."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    root = str(Path(__file__).resolve().parents[3])
    with its, contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(root=root, module=module, fd=its.fileno())],
            pass_fds=(its.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | environment,
        )
    return process, mine


def _await_end(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("paceline-call", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def _error(failure: messages.Failed) -> errors.PacelineError:
    kind = errors.kind_of(failure.kind)
    if kind is errors.ScriptError:
        return errors.ScriptError(failure.what, why=failure.why, fix=failure.fix, traceback=failure.traceback)
    assert issubclass(kind, errors.PacelineError)
    return kind(failure.what, why=failure.why, fix=failure.fix)
