"""The launcher of a run on this machine: its coordinator's hands and eyes. A process of its own (``engine/front.py``).

It has workers and servers forked by the zygote, carries messages to the pure ``Coordinator`` and does what that says,
watches every process, and has told what happens (``telling.py``). It holds no lock and runs one loop.

It may be killed. What has come to it is in its diary (``engine/diary.py``), what it has made is kept by the front, and
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
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from paceline import config_file, errors, events
from paceline.engine.channels import Channels, forget
from paceline.engine.checkpoints import Checkpoints
from paceline.engine.control import Control
from paceline.engine.diary import LONG_BYTES, NAME, Diary, Entry
from paceline.engine.lookout import Lookout
from paceline.engine.memories import Memories
from paceline.engine.metrics import seconds_a_step
from paceline.engine.saver import PARTS, Saver
from paceline.engine.setup import Setup, decode_job
from paceline.engine.telling import Telling
from paceline.engine.watch import Whose
from paceline.engine.wishes import Wishes
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator, how_ended
from paceline.protocol.effects import (
    Abort,
    Allocate,
    AskToLeave,
    Came,
    Died,
    Done,
    Effect,
    Give,
    GiveUp,
    Interrupted,
    Open,
    Replace,
    Serve,
    Tell,
    Wished,
)
from paceline.protocol.rounds import LEFT
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel, Closed, Peeked
from paceline.transport.frame import encode
from paceline.transport.lock import Lock

_TICK_S = 0.05
_GRACE_S = 2.0  # between telling processes to stop and killing them
_INTERRUPT_S = 10.0  # between Ctrl-C and the same
_PR_SET_PDEATHSIG = 1
_ZYGOTE = ("zygote", 0)
_OWN = ("front", "launcher")  # entries of no channel that is looked at before it is read


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
        directory = Path(begin.directory)
        self._diary = Diary(directory / NAME)
        again = bool(self._diary.entries)
        began_s = self._diary.entries[0].time_s if again else None
        self._telling = telling = Telling(job, begin, began_s, front.send)
        self._directory, self._info, self._merger = telling.directory, telling.info, telling.merger
        # Who has data that nobody else has, or reads it for all, cannot be replaced.
        restarts = 0 if job.data == "served" else job.restarts
        self._coordinator = Coordinator(job.workers, job.servers, restarts=restarts, min_workers=job.min_workers)
        self._wishes = Wishes(job, self._coordinator)
        self._control = Control(directory)
        self._silent = False  # while what is long done is only read again
        checkpoints = Checkpoints(directory, job.keep)
        self._saver = Saver(checkpoints, job.workers, telling.note_now)
        self._channels = Channels(front)
        self._alive: dict[tuple[str, int], int] = {}
        self._expected = job.workers + job.servers
        self._failure: tuple[str, int, messages.Failed] | None = None
        self._kill_at_s: float | None = None
        self._done = False
        self._interrupts = 0
        self._dropped = 0
        self._births: dict[tuple[str, int], int] = {}
        self._died: Counter[int] = Counter()  # processes of a worker
        self._payload: int | None = None
        self._parts: dict[
            tuple[int, int, int], int
        ] = {}  # of checkpoints that are not written yet, as the front has them
        channels = {}
        for hold, fd in held:
            if hold.what == "channel":
                channels[hold.role, hold.rank] = fd
            else:
                self._take_over(hold, fd)
        telling.add_process("front", begin.front)
        told: set[str] = set()
        if again:
            told = self._go_on(begin, channels)
        else:
            telling.add_process("launcher", os.getpid())
            for file, place in telling.recorder.places.items():
                telling.show(file, place, [])
            self._channels.open_those([_ZYGOTE], channels)
            frame = encode(msgspec.structs.replace(begin, setup=b""))
            self._diary.append(Entry(telling.started_s, "front", 0, frame, telling.recorder.places))
        telling.write_info()
        self._tell_of_launchers(begin.deaths, told)

    def _take_over(self, hold: messages.Hold, fd: int) -> None:
        """What the front keeps."""
        match hold.what:
            case "board":
                self._board_fd = fd
                self._board = Board(segment.attach(fd))
                self._memories = Memories(self._front, self._board)
                self._lookout = Lookout(self._board, self._job.hang_timeout)
                self._lock = Lock(fd, self._board.journal)
            case "payload":
                self._payload = fd
            case "memory":
                self._memories.keep(msgspec.msgpack.decode(hold.about, type=messages.Memory), fd)
            case what if what in PARTS:
                self._parts[hold.rank, hold.number, what == PARTS[0]] = fd

    def run(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """The whole life of the run. ``said``: what the front has said since."""
        self._heed(said)
        while self._alive or self._expected:
            self._turn()
        self._saver.close()
        self._control.close()
        if self._failure is None and self._coordinator.was_interrupted:
            self._failure = ("launcher", 0, messages.Failed("Interrupted", "stopped by Ctrl-C"))
        outcome = self._telling.conclude(self._coordinator.reason, self._failure)
        self._diary.close()
        self._front.send(outcome)

    # --- going on ---

    def _go_on(self, begin: messages.Begin, channels: dict[Whose, int]) -> set[str]:
        """Come to where the launcher before this one was; what it had told that the user has not seen until now."""
        telling = self._telling
        shown = telling.recorder.show_since(begin.shown)
        entries = self._diary.entries[1:]
        # Only the last entry of a process may be obeyed in part; what came behind it, it led to.
        last = max((place for place, entry in enumerate(entries) if entry.role not in _OWN), default=len(entries))
        self._be_silent(True)
        for entry in entries[:last]:
            self._obey_entry(entry)
        doubtful = entries[last:]
        if doubtful:
            telling.recorder.expect(doubtful[0].places)
        self._channels.open_those([_ZYGOTE, *self._alive], channels)
        for entry in doubtful:
            peeked = self._channels.still_there(entry)
            self._be_silent(entry.role not in _OWN and not peeked)
            self._obey_entry(entry, peeked)
            self._channels.consume((entry.role, entry.rank), peeked)
        self._be_silent(False)
        self._channels.open_those([_ZYGOTE, *self._alive], channels)
        for fd in channels.values():
            os.close(fd)
        telling.add_process("launcher", os.getpid())
        if self._info.status == "running":
            telling.started()
        return {record.text for record in shown if isinstance(record, events.Notice)}

    def _be_silent(self, silent: bool) -> None:
        """What is long done is only read again."""
        self._silent = self._channels.silent = self._telling.silent = silent

    def _tell_of_launchers(self, deaths: Sequence[str], told: set[str]) -> None:
        for text in deaths:
            if any(other.startswith(text) for other in told):
                continue
            text += f"; another (pid {os.getpid()}) goes on from {self._directory}"
            text += "; training went on meanwhile" if self._info.status == "running" else ""
            self._telling.note_now("died", text, "launcher", 0)

    def _write_config(self) -> None:
        """As the run is now, so that ``paceline resume`` goes on with as many workers and servers as it had last."""
        setup = msgspec.msgpack.decode(self._setup, type=Setup)
        wanted = {"workers": self._coordinator.wanted, "servers": self._coordinator.wanted_servers}
        job = replace(self._job, **wanted)  # type: ignore[arg-type]
        text = config_file.dump(job, setup.script or None, setup.args)
        (self._directory / "config.toml").write_text(text)

    # --- starting ---

    def _fork_all(self) -> None:
        for role, count in (("server", self._job.servers), ("worker", self._job.workers)):
            for rank in range(count):
                self._fork(role, rank)

    def _fork(self, role: str, rank: int) -> None:
        birth = self._births[role, rank] = self._births.get((role, rank), 0) + 1
        if self._silent:
            return
        path = self._directory / "logs" / f"{role}-{rank}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        payload = (self._payload,) if role == "worker" and self._payload is not None else ()
        self._channels.send(_ZYGOTE, messages.Fork(role, rank, self._setup, birth), (self._board_fd, log, *payload))
        os.close(log)

    # --- the loop ---

    def _turn(self) -> None:
        for whose in self._channels.ready(_TICK_S):
            if whose[0] == "front":
                self._heed(self._front.drain())
            else:
                self._hear(whose)
        self._saver.turn()
        if self._saver.saved > self._dropped:
            self._dropped = self._saver.saved
            self._front.send(messages.Drop(self._dropped))
        self._control.turn(self._answer)
        self._telling.recorder.flush()
        self._telling.show_output()
        self._look_after()
        if self._kill_at_s is not None and time.monotonic() > self._kill_at_s:
            self._kill_all()

    def _hear(self, whose: Whose) -> bool:
        """Write down what there is to read from a process, obey it, and take it. Was there anything?"""
        peeked = self._channels.peek(whose)
        if whose == _ZYGOTE:
            peeked = self._before_an_end(peeked)
        if peeked:
            self._note(*whose, b"".join(one.frame for one in peeked), peeked)
            self._channels.consume(whose, peeked)
            if self._diary.size_bytes > LONG_BYTES:
                self._diary.shorten(self._merger.state(), self._saver.saved)
        return bool(peeked)

    def _before_an_end(self, peeked: list[Peeked]) -> list[Peeked]:
        """What a process said before it ended comes first: a traceback explains more than an exit status."""
        for place, one in enumerate(peeked):
            if isinstance(one.message, messages.Exited):
                whose = (one.message.role, one.message.rank)
                while place == 0 and self._hear(whose):
                    pass
                # What it left half done is undone first: one killed while it was leaving has not left.
                cut = place or int(self._is_whole())
                forget(peeked[cut:])
                return peeked[:cut]
        return peeked

    def _note(self, role: str, rank: int, frames: bytes, peeked: Sequence[Peeked] = ()) -> None:
        """Write down what has come, and obey it."""
        left = [worker for worker, gone in enumerate(self._board.gone) if gone == LEFT] if role == "zygote" else []
        entry = Entry(self._telling.now(), role, rank, frames, self._telling.recorder.places, left)
        self._diary.append(entry)
        self._obey_entry(entry, peeked)

    def _obey_entry(self, entry: Entry, peeked: Sequence[Peeked] = ()) -> None:
        self._telling.at_s = entry.time_s
        if entry.merged:
            self._merger.restore(entry.merged)
        for place, message in enumerate(one.message for one in peeked) if peeked else enumerate(entry.messages):
            self._take(entry, message, peeked[place].descriptors if peeked else ())
        self._telling.flush()  # who finds the messages taken finds what they led to written

    def _heed(self, said: list[tuple[messages.Any, tuple[int, ...]]]) -> None:
        """What the front has said."""
        for message, _ in said:
            match message:
                case messages.Interrupt(times=times) if times > self._interrupts:
                    self._note("front", 0, encode(message))
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
            case messages.Ready(versions=versions):
                self._info.versions = versions
                self._fork_all()
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
            case messages.Scale():
                self._scale(message)
            case messages.Joined():
                if role == "worker":
                    self._saver.joined(rank)
                self._obey(self._coordinator.handle(Came(role, rank, message)))
            case messages.Pass(number=number, steps=steps):
                self._wishes.epoch = number + 1
                self._telling.record(events.Epoch(self._telling.at_s, number + 1, steps))
            case messages.Interrupt(times=times):
                self._interrupted(times)
            case _:
                self._obey(self._coordinator.handle(Came(role, rank, message)))

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
            if self._done:  # while it was forked
                self._channels.send((role, rank), messages.Stop("all workers have finished"))
        self._alive[role, rank] = pid
        self._expected -= 1
        self._telling.add_process(role, pid, rank)
        if self._expected == 0 and self._info.status == "running":
            self._telling.write_info()
        elif self._expected == 0:
            self._info.status = "running"
            self._telling.write_info()
            self._telling.started()

    def _is_whole(self) -> bool:
        """Is nothing half done under the run's lock?"""
        if not self._board.journal.is_clean:
            self._lock.try_to_mend()
        return self._board.journal.is_clean

    def _exited(self, role: str, rank: int, pid: int, status: int, *, left: bool) -> None:
        self._channels.close((role, rank))
        if role == "worker":
            self._saver.lost(rank, finished=status == 0)
        self._alive.pop((role, rank), None)
        if left:  # it had no time to say so
            self._obey(self._coordinator.handle(Came(role, rank, messages.Finished())))
            self._board.wake_all()  # nor to ring
        self._obey(self._coordinator.handle(Died(role, rank, pid, status)))

    def _obey(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Allocate(request=request, servers=servers, workers=workers):
                    self._allocate(request, servers, workers)
                case Give(rank=rank, number=number):
                    memory, fd = self._memories[number]
                    self._channels.send(("worker", rank), memory, (fd,))
                case Replace(rank=rank, role="server"):
                    self._expected += 1
                    self._fork("server", rank)
                case Replace(rank=rank):
                    self._tell_death(rank, for_good=False)
                    self._expected += 1
                    self._fork("worker", rank)
                case Open(rank=rank, role="server"):
                    self._expected += 1
                    self._fork("server", rank)
                case Serve(crew=crew, kept=kept):
                    if not self._silent:
                        self._board.set_servers(crew, kept)
                    if self._info.servers != self._coordinator.wanted_servers:
                        self._tell_of_numbers()
                case Open(rank=rank):
                    self._died[rank] += 1  # to the others it is as if one had
                    if not self._silent:
                        self._board.open_place(rank, self._memories.newest, deaths=self._died[rank])
                    self._expected += 1
                    self._fork("worker", rank)
                case AskToLeave(rank=rank):
                    if not self._silent:
                        self._board.ask_to_leave(rank)
                case GiveUp(rank=rank):
                    self._tell_death(rank, for_good=True)
                    if not self._silent:
                        self._board.want(self._coordinator.wanted)
                case Tell(kind=kind, text=text, role=role, rank=rank):
                    self._telling.note(kind, text, role, rank)
                case Abort(role=role, rank=rank, failure=failure):
                    self._abort(role, rank, failure)
                case Done():
                    self._done = True
                    self._channels.send_all(("server",), messages.Stop("all workers have finished"))
                    if not self._silent:
                        self._board.wake_all()

    def _answer(self, question: messages.Any) -> messages.Any:
        """To a user, see engine/control.py."""
        if not isinstance(question, messages.Scale):
            return messages.Scaled(kind="UsageError", what=f"a run does not answer {type(question).__name__}")
        if self._info.status != "running" or self._failure is not None:
            return messages.Scaled(kind="UsageError", what="the run is just beginning, or ending", fix="try again")
        answer = self._wishes.answer(question)
        if answer.kind or (question.workers is None and question.servers is None):
            return answer
        try:
            for rank in range(self._coordinator.wanted, question.workers or 0):
                self._memories.reserve_place(rank)
        except errors.HostError as error:
            return messages.Scaled(kind="HostError", what=error.what, why=error.why, fix=error.fix)
        self._note("launcher", 0, encode(question))
        return answer

    def _scale(self, wish: messages.Scale) -> None:
        """Of a wish that is not refused."""
        for text in self._wishes.answer(wish).told:
            self._telling.note("scale", text)
        if wish.workers is not None:
            threads = self._job.threads or max(1, len(os.sched_getaffinity(0)) // wish.workers)
            setup = msgspec.msgpack.decode(self._setup, type=Setup)
            self._setup = msgspec.msgpack.encode(msgspec.structs.replace(setup, threads=threads))
            if not self._silent:
                self._board.want(wish.workers)
        self._obey(self._coordinator.handle(Wished(wish.workers, wish.servers)))
        self._tell_of_numbers()

    def _tell_of_numbers(self) -> None:
        """In the run's files: how many workers and servers there are to be."""
        self._info.workers, self._info.servers = self._coordinator.wanted, self._coordinator.wanted_servers
        self._telling.write_info()
        self._write_config()

    def _tell_death(self, rank: int, *, for_good: bool) -> None:
        self._died[rank] += 1
        self._merger.lost(rank)
        if not self._silent:
            self._lock.try_to_mend()
            self._board.tell_death(rank, for_good=for_good, deaths=self._died[rank])

    def _allocate(self, request: messages.Wrap, servers: bool, workers: Sequence[int]) -> None:
        if self._silent:
            return
        try:
            self._memories.make(request)
        except errors.HostError as error:
            failure = messages.Failed("HostError", error.what, error.why, error.fix)
            self._note("launcher", 0, encode(failure))  # the coordinator must know why workers leave
            return
        memory, fd = self._memories[request.number]
        # Servers first: they are ready when the first push comes.
        if servers:
            self._channels.send_all(("server",), memory, (fd,))
        for rank in workers:
            self._channels.send(("worker", rank), memory, (fd,))
        if request.kind == "exchange":
            optimizer, _, rest = request.what.partition(" over ")
            size_bytes = self._memories.size_bytes(request.number)
            self._telling.record(events.Wrapped(self._telling.at_s, int(rest.split()[0]), size_bytes, optimizer))

    # --- stopping ---

    def _abort(self, role: str, rank: int, failure: messages.Failed) -> None:
        self._failure = self._failure or (role, rank, failure)  # what we kill dies of us
        if not self._silent:
            self._board.set_abort()
        self._channels.send_all(("server", "worker"), messages.Stop(failure.what))
        self._kill_at_s = min(self._kill_at_s or 2**62, time.monotonic() + _GRACE_S)

    def _look_after(self) -> None:
        """Kill processes that do not get on: their deaths are then told, and mended, as any other's."""
        now_s = time.monotonic()
        if not self._lookout.is_due(now_s):
            return
        if not self._board.journal.is_clean:
            self._lock.try_to_mend()  # who takes the lock does so, but for one who cannot
        if self._failure is not None or self._interrupts:
            return
        for whose, what in self._lookout.stuck(self._alive, now_s):
            role, rank = whose
            text = f"{role} {rank} (pid {self._alive[whose]}) {what}: it is killed"
            self._telling.note_now("stuck", text, role, rank)
            os.kill(self._alive[whose], signal.SIGKILL)

    def _interrupted(self, times: int) -> None:
        """Ctrl-C or SIGTERM: first, let the round finish; second, now."""
        self._interrupts = times
        self._board.set_interrupt()
        self._obey(self._coordinator.handle(Interrupted()))
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
