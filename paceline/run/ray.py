"""Workers in actors of Ray, on the nodes of a cluster; the run's home is the process that asks for it, Ray's driver.

    driver: front, launcher, deputies, servers --report: "worker r is waited for"--> Seats --> an actor on some node
       ^                                                                                            | starts
       +------------------------------- link: gradients, parameters, what is printed ---------- the script (run/seat.py)

Ray finds the nodes (room.py), starts processes there and tells of their ends; nothing of the training passes through
it. A worker that is lost is replaced by a new actor as soon as its next deputy waits for it; where no node has room,
the others go on without it if they may (``--min-workers``), and it comes again when a node does. Servers elsewhere
(``--server-hosts``) are in actors too; one that was lost is not replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from paceline.config import Job
from paceline.engine.checkpoint.checkpoints import Loaded
from paceline.engine.launcher.control import ask
from paceline.engine.launcher.front import run_local
from paceline.engine.program import CAME, WAITS, Elsewhere, Errand, Script
from paceline.errors import ConfigError, HostError, PacelineError, WorkersLost
from paceline.events import Record, RunInfo, Started, Summary
from paceline.protocol import messages
from paceline.run.doors import hold_ports, key_in_file, own_address, ports_of, told, warn_insecure
from paceline.run.room import Room, cpus
from paceline.transport.interfaces import Advertised
from paceline.transport.keys import JobKey, job_key

_SEAT = "import sys; sys.path.append({root!r}); from paceline.run.seat import main; main({pid})"
_TURN_S = 0.2
_LOOK_S = 1.0  # how often nodes are looked after
_TRIES = 3  # so often a worker's process is started without ever coming home
_TAIL = 2000  # characters of what a process has said last, for error messages


class Cluster:
    """Ray's, for one run, or for going on from a checkpoint. ``open`` it first, and ``close`` it in the end."""

    def __init__(self, job: Job, resume: Loaded | None = None) -> None:
        self._job, self._resume = job, resume
        self._opened = contextlib.ExitStack()

    def open(self, say: Callable[[str], None]) -> None:
        """Connect, and hold the ports that workers come to; ``say`` shows lines. Raises ConfigError, HostError."""
        job = self._job
        if job.insecure and job_key(os.environ) is not None:
            raise ConfigError("--insecure is given, and a job key too", fix="leave one of them out")
        ray = self._ray = imported()
        if not ray.is_initialized():
            _connect(ray, job)
            self._opened.callback(ray.shutdown)
        address = _address(ray, job)
        self._host, self._held = address.address, hold_ports(address.address, job)
        for sock in self._held:
            self._opened.callback(sock.close)
        say(told(address.address, address.reason, self._held, insecure=job.insecure))
        self._room = Room(ray, job)
        has, needed = self._room.cpus, job.workers * cpus(job)
        if has < needed:
            where = (" beside home's" if job.server_hosts == 1 else " beside the servers'") if job.servers_apart else ""
            say(f"Ray's cluster has {has:g} CPUs{where}, and {needed} are asked for: waiting until it has grown")
        if job.insecure:
            warn_insecure()

    def run(self, job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]) -> Summary:
        """As ``run_local``."""
        made = "" if job.insecure else self._opened.enter_context(key_in_file(os.environ))
        readable, writable = os.pipe()
        ports, server_ports = ports_of(job, self._held)
        name = os.urandom(8).hex()
        elsewhere = Elsewhere(
            program.path, program.args, self._host, ports, name, os.getpid(), writable, job.insecure, server_ports
        )
        seats = _Seats(self._ray, self._room, job, elsewhere, readable, Path(made).read_text().strip() if made else "")

        def seen(record: Record) -> None:
            if isinstance(record, Started):
                seats.directory = Path(record.directory)
            watch(record)

        # Ray prints what it has to say of lost nodes, and standard output may be for a program to read.
        with contextlib.redirect_stdout(sys.stderr):
            seats.start()
            try:
                return run_local(job, elsewhere, watch=seen, argv=argv, resume=self._resume)
            finally:
                seats.close()
                self.close()

    def close(self) -> None:
        self._opened.close()


def imported() -> Any:
    """Ray. Raises ConfigError without it."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ConfigError("--engine ray needs Ray, which is not installed", fix="pip install 'paceline[ray]'") from None
    return ray


def _connect(ray: Any, job: Job) -> None:
    """To the cluster that is named, or that Ray finds; else one is started on this machine. Raises HostError."""
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    named = job.ray_address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=named or "auto", **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if named:
            raise HostError(
                f"there is no Ray cluster at {named}: {str(error).strip().splitlines()[0]}",
                fix="ray status, on its head node; without --ray-address and RAY_ADDRESS Ray looks for one itself",
            ) from None
        ray.init(num_cpus=max(len(os.sched_getaffinity(0)), job.workers * cpus(job)), **quiet)


def _address(ray: Any, job: Job) -> Advertised:
    """Where workers come to."""
    if job.interface is not None:
        return own_address(job.interface)
    if ray.util.client.ray.is_connected():  # a driver outside of the cluster, which Ray knows no address of
        return own_address(None)
    return Advertised(ray.util.get_node_ip_address(), "", "as Ray knows this host")


class Seat:
    """On a node, as an actor: starts a worker's process and waits for its end. Its argument never leaves the process's
    memory but for the standard input of that one."""

    def run(self, errand: bytes, folder: str) -> tuple[int, str]:
        """Its exit code, and what it has said last. ``folder``: the driver's, where this node may have the script."""
        script = msgspec.json.decode(errand, type=Errand).script
        folders = [there for there in (folder, os.getcwd()) if (Path(there) / script).is_file()]
        if not folders:
            raise FileNotFoundError(f"node {socket.gethostname()} has no {script} in {folder} or {os.getcwd()}")
        root = str(Path(__file__).resolve().parent.parent.parent)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SEAT.format(root=root, pid=os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folders[0],
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(errand)
            process.stdin.close()
        tail = b""
        while data := os.read(process.stdout.fileno(), 1 << 15):
            tail = (tail + data)[-_TAIL:]
        return process.wait(), tail.decode(errors="replace")


class _Who(NamedTuple):
    """A worker or a server elsewhere, as deputies call it: "1", "s1"."""

    role: str
    number: int

    @staticmethod
    def read(text: str) -> _Who:
        return _Who("server", int(text[1:])) if text.startswith("s") else _Who("worker", int(text))

    def __str__(self) -> str:
        return f"{self.role} {self.number}"


@dataclass
class _Taken:
    """An actor of somebody's; ``ended``: of its process. ``tries``: so many have been started without coming home."""

    actor: Any
    ended: Any
    tries: int
    came: bool = False


class _Seats(threading.Thread):
    """Has an actor for everyone that is waited for. A thread of the driver's."""

    def __init__(self, ray: Any, room: Room, job: Job, elsewhere: Elsewhere, report: int, key: str) -> None:
        """``report``: a descriptor, which the deputies write to; ``key``: in hex, if workers are to be given one."""
        super().__init__(name="paceline-seats", daemon=True)
        self._ray, self._room, self._job, self._elsewhere, self._key = ray, room, job, elsewhere, key
        self._actor = ray.remote(num_cpus=cpus(job), max_restarts=0)(Seat)
        self._report, self._unread = report, b""
        self._taken: dict[_Who, _Taken] = {}
        self._servers: set[_Who] = set()  # that were waited for: once each
        self._refusal: PacelineError | None = None  # that the run has not been told of yet
        self._stopping = threading.Event()
        self._nodes: set[str] = set()
        self._has_room = True  # may there be room for one more?
        self._gone: set[int] = set()  # ranks that have not come again in time
        self._looked_s = 0.0
        self.directory: Path | None = None  # of the run, once it is known

    def run(self) -> None:
        try:
            self._room.reserve(range(self._job.workers))
            while not self._stopping.is_set():
                self._hear()
                self._look_at_ends()
                if time.monotonic() > self._looked_s + _LOOK_S:
                    self._looked_s = time.monotonic()
                    self._look_at_servers()
                    self._look_at_nodes()
        except Exception as error:  # noqa: BLE001  the thread's outermost line; Ray has many kinds
            if not self._stopping.is_set():
                self._refuse(_Who("worker", 0), HostError(f"Ray fails: {str(error).strip().splitlines()[0]}"))

    def close(self) -> None:
        """All actors end, and what was reserved is free again."""
        self._stopping.set()
        self.join()
        os.close(self._report)
        for taken in self._taken.values():
            self._kill(taken)
        self._room.release()

    # --- who is waited for ---

    def _hear(self) -> None:
        """What deputies have said: who is waited for, or is not any more."""
        if not select.select([self._report], [], [], 0 if self._pending() else _TURN_S)[0]:
            return
        data = os.read(self._report, 4096)
        if not data:
            self._stopping.wait(_TURN_S)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            text, what = line.decode().split()
            who = _Who.read(text)
            if what == CAME:
                if who in self._taken:
                    self._taken[who].came = True
                continue
            if who.role == "server":
                if who not in self._servers:
                    self._servers.add(who)
                    self._seat(who)
                continue
            self._free(who)
            if what == WAITS:
                self._gone.discard(who.number)
                self._seat(who)
            else:
                self._gone.add(who.number)  # there was no room; as soon as there is, it comes again
                self._has_room = True

    def _seat(self, who: _Who, tries: int = 1) -> None:
        """Have an actor started, as soon as there is room."""
        is_server, number = who.role == "server", who.number
        strategy = self._room.strategy_of_server(number) if is_server else self._room.strategy(number)
        actor = self._actor.options(scheduling_strategy=strategy, name=None).remote()
        there = self._elsewhere
        errand = Errand(
            -1 if is_server else number,
            there.job,
            there.host,
            there.server_ports[number] if is_server else there.ports[number],
            str(there.path),
            there.args,
            cpus(self._job),
            there.insecure,
            self._key,
            number if is_server else -1,
        )
        # An argument of a method goes to the actor's process alone; one of its constructor, or a variable of its
        # environment, would be kept by Ray's control service, and shown by it.
        ended = actor.run.remote(msgspec.json.encode(errand), os.getcwd())
        self._taken[who] = _Taken(actor, ended, tries)

    def _free(self, who: _Who) -> None:
        taken = self._taken.pop(who, None)
        if taken is not None:
            self._kill(taken)

    def _kill(self, taken: _Taken) -> None:
        with contextlib.suppress(Exception):  # Ray has several for an actor that is not there any more
            self._ray.kill(taken.actor)

    # --- who has ended ---

    def _pending(self) -> dict[Any, _Who]:
        return {taken.ended: who for who, taken in self._taken.items()}

    def _look_at_ends(self) -> None:
        pending = self._pending()
        ready, _ = self._ray.wait(list(pending), timeout=_TURN_S) if pending else ([], [])
        for ended in ready:
            self._ended(pending[ended])

    def _ended(self, who: _Who) -> None:
        """A process is over, or what it was on. If it had come home its deputy knows, and may wait for another."""
        taken = self._taken[who]
        try:
            code, said = self._ray.get(taken.ended)
            why = f"exit code {code}; its last words: {said.strip()}"
        except self._ray.exceptions.RayTaskError as error:
            self._refuse(who, ConfigError(f"{who} cannot be started: {error.cause}", fix=_FIX_NODE))
            return
        except self._ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[0]
        self._free(who)
        if taken.came:
            return
        if taken.tries < _TRIES:
            self._seat(who, taken.tries + 1)
            return
        what = f"{who} has been started {_TRIES} times and never came home"
        self._refuse(who, WorkersLost(what, why=why, fix="does its node reach home's address? --interface"))

    def _refuse(self, who: _Who, error: PacelineError) -> None:
        """End the run with this, in the worker's name; or a server's."""
        from paceline.run.elsewhere import meet  # and torch: only here

        self._free(who)
        if who.role == "server":
            self._refusal = self._refusal or error
            return
        there, rank = self._elsewhere, who.number
        key = None if there.insecure else JobKey(bytes.fromhex(self._key)) if self._key else job_key(os.environ)
        with contextlib.suppress(PacelineError, SystemExit):
            worker = meet(rank, 0, there.job, (there.host, there.ports[rank]), key)
            worker.broke(_failed(error))

    def _look_at_servers(self) -> None:
        """One that has come is its deputy's; the node of one that has not may be lost before."""
        for server in self._room.lost_servers:
            if (who := _Who("server", server)) in self._taken and not self._taken[who].came:
                self._refuse(
                    who, HostError(f"the node of {who} is lost", fix="start the run again, or paceline resume")
                )
        if self._refusal is not None and self.directory is not None:
            with contextlib.suppress(PacelineError):  # the run is ending
                ask(self.directory, _failed(self._refusal))
            self._refusal = None

    # --- nodes that come ---

    def _look_at_nodes(self) -> None:
        nodes = self._room.nodes
        self._has_room = self._has_room or bool(nodes - self._nodes)
        self._nodes = nodes
        if not self._has_room or self.directory is None:
            return
        wanted = msgspec.json.decode((self.directory / "run.json").read_bytes(), type=RunInfo).workers
        missing = self._gone | set(range(wanted, self._job.max_workers or wanted))
        if not missing:
            self._has_room = False
        elif self._room.fits(min(missing)):
            self._ask_for(max(min(missing) + 1, wanted))

    def _ask_for(self, workers: int) -> None:
        """So many, of the launcher: deputies of those that are missing will say that they wait. It may refuse."""
        assert self.directory is not None
        with contextlib.suppress(PacelineError):  # the run is ending
            ask(self.directory, messages.Scale(workers))


def _failed(error: PacelineError) -> messages.Failed:
    return messages.Failed(type(error).__name__, error.what, error.why, error.fix)


_FIX_NODE = (
    "every node needs paceline, and the script in the same place; or ray job submit --working-dir . -- paceline run ..."
)
