"""A worker among processes that torchrun (or another starter that sets RANK and WORLD_SIZE) has started, on any hosts.

    rank 0's process --starts--> home: front, launcher, a deputy for every rank, each listening
            |  where they listen: the store at MASTER_ADDR:MASTER_PORT, torch's own
            v
    every rank --link--> its deputy

Home is beside rank 0. Every rank, also that one, is a worker elsewhere (``engine/remote.py``).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import msgspec

from paceline.config import Pace
from paceline.engine.line import STOPPED, Line
from paceline.engine.mail import PATIENCE
from paceline.engine.program import Order
from paceline.engine.remote import RemoteWorker
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.protocol import messages, remote
from paceline.protocol.link import Peer
from paceline.transport.borrow import this_host
from paceline.transport.connect import connect
from paceline.transport.ends import End
from paceline.transport.keys import FILE_VARIABLE, VARIABLE, JobKey, job_key, new_job_key, read_job_key
from paceline.transport.tls import Credentials

INSECURE = "PACELINE_INSECURE"
PORT = "PACELINE_PORT"
_MEET_S = 600.0  # ranks may come late: they import, or read data, before they call init
_CONNECT_S = 30.0
_HOME = "import sys; sys.path.append({root!r}); from paceline.cli.home import main; main()"


class Place(msgspec.Struct, frozen=True):
    """What is published of home. ``failed``: why there is none. ``key_file``: a key made for this run, on one host."""

    job: str = ""
    host: str = ""
    ports: list[int] = []
    key_file: str = ""
    failed: str = ""


@dataclass(frozen=True)
class _Rank:
    rank: int
    world: int
    is_one_host: bool
    master: str
    attempt: str

    @staticmethod
    def read(environment: Mapping[str, str]) -> _Rank:
        """Raises HostError where the environment is only half of one."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise HostError(
                f"WORLD_SIZE is {environment.get('WORLD_SIZE')}, but {', '.join(missing)} is not set",
                fix="torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or: paceline run SCRIPT --workers N",
            )
        return _Rank(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
            environment["MASTER_ADDR"],
            environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )


def join(options: Mapping[str, Any]) -> RemoteWorker:
    """Become a worker of the run that these processes are; rank 0 starts its home. Blocks until all of it is there.

    ``options``: fields of Job; those of rank 0 count. Raises HostError, ConfigError.
    """
    place = _Rank.read(os.environ)
    insecure = _is_insecure(os.environ)
    given = None if insecure else job_key(os.environ)
    if given is None and not insecure and not place.is_one_host:
        raise ConfigError(
            "workers on several hosts need a job key",
            why="without one whoever reaches the port could read and change the training",
            fix="python -c 'from paceline.transport.keys import new_job_key; new_job_key(\"job.key\")', copy the file "
            f"to every host, set {FILE_VARIABLE}=job.key there; or {INSECURE}=1 on a network that you trust",
        )
    store = _store(place.attempt)
    store.set(f"host/{place.rank}", this_host())
    if place.rank == 0:
        home = _Home(place, options, insecure=insecure, has_key=given is not None, store=store)
        there, key = home.place, given or home.key
    else:
        there = msgspec.json.decode(store.get("home"), type=Place)
        if there.failed:
            raise HostError(f"home, beside rank 0, has not started: {there.failed}")
        key = given or (read_job_key(there.key_file) if there.key_file else None)
    line = Line(place.rank)
    end = End(
        me=Peer(place.rank, "worker"),
        job=there.job,
        messages=remote.Any_,
        sink=line.sink,
        place=line.mail.place,
        credentials=None if insecure or key is None else Credentials.issue(key),
        insecure=insecure,
        patience=PATIENCE,
    )
    link = connect(end, (there.host, there.ports[place.rank]), _CONNECT_S)
    hosts = [store.get(f"host/{rank}").decode() for rank in range(place.world)]
    worker = RemoteWorker(link, line, place.rank, hosts)
    _Life(worker, home if place.rank == 0 else None, store).begin()
    return worker


def _is_insecure(environment: Mapping[str, str]) -> bool:
    text = environment.get(INSECURE, "").strip().lower()
    if text not in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        raise ConfigError(f"{INSECURE} is {text!r}; it must be 1 or 0")
    insecure = text in ("1", "true", "yes", "on")
    if insecure and (environment.get(FILE_VARIABLE) or environment.get(VARIABLE)):
        raise ConfigError(f"{INSECURE} is set, and a job key too", fix="unset one of them")
    return insecure


def _store(attempt: str) -> Any:
    """Torch's store of these processes, as ``init_process_group`` would have it: the agent's under torchrun, else one
    that rank 0 serves and shares with whoever asks in its process."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_S)))
    except Exception as error:  # noqa: BLE001  torch raises several kinds, of its own too
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise HostError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}") from None
    return PrefixStore(f"paceline/{attempt}", store)


class _Home:
    """The process beside rank 0 that the run is at home in."""

    def __init__(self, rank: _Rank, options: Mapping[str, Any], *, insecure: bool, has_key: bool, store: Any) -> None:
        self.key: JobKey | None = None
        self._folder: Path | None = None
        try:
            self.place = self._start(rank, options, insecure=insecure, has_key=has_key)
        except PacelineError as error:
            store.set("home", msgspec.json.encode(Place(failed=error.what)))
            raise
        store.set("home", msgspec.json.encode(self.place))

    def _start(self, rank: _Rank, options: Mapping[str, Any], *, insecure: bool, has_key: bool) -> Place:
        host = "127.0.0.1" if rank.is_one_host else _address(rank.master)
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        key_file = ""
        if not insecure and not has_key:
            # On one host: who can read the file may do all that this user may; the store, which asks nobody who he is,
            # learns its name only.
            self._folder = Path(tempfile.mkdtemp(prefix="paceline-"))
            key_file = str(self._folder / "job.key")
            self.key = new_job_key(key_file)
            environment[FILE_VARIABLE] = key_file
        readable, writable = os.pipe()
        job = os.urandom(8).hex()
        order = Order(
            script=str(Path(sys.argv[0]).resolve()),
            args=sys.argv[1:],
            workers=rank.world,
            options={name: str(value) if isinstance(value, Pace | Path) else value for name, value in options.items()},
            host=host,
            port=_port(os.environ),
            job=job,
            starter=os.getpid(),
            report=writable,
            insecure=insecure,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _HOME.format(root=str(Path(__file__).resolve().parent.parent.parent))],
            stdin=subprocess.PIPE,
            pass_fds=(writable,),
            env=environment,
            start_new_session=True,  # what is sent to the group of the ranks is not meant for it
        )
        os.close(writable)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(order))
            self.process.stdin.close()
        ports = self._read_ports(readable, rank.world)
        return Place(job, host, ports, key_file)

    def _read_ports(self, readable: int, world: int) -> list[int]:
        """Where deputies listen, by rank, once all do."""
        ports: dict[int, int] = {}
        with os.fdopen(readable) as lines:
            while len(ports) < world:
                line = lines.readline()
                if not line:
                    code = self.process.wait()
                    raise HostError(f"it ended with exit code {code}; what it said stands above")
                rank, port = line.split()
                ports[int(rank)] = int(port)
        return [ports[rank] for rank in range(world)]

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Its exit code, when the run has ended."""
        code = self.process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        return code


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get(PORT, "0")
    if not text.isdigit() or not 0 <= int(text) < 2**16:
        raise ConfigError(f"{PORT} is {text!r}; it must be a port, 0 for any that is free")
    return int(text)


def _address(master: str) -> str:
    """The address of this host that MASTER_ADDR means. Raises HostError."""
    try:
        address = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise HostError(f"MASTER_ADDR is {master}, which is no name of an address: {error.strerror}") from None
    if str(address).startswith("127.") or address == "::1":
        raise HostError(
            f"MASTER_ADDR is {master}, which is {address} here: other hosts do not reach it",
            fix="torchrun --master-addr ADDRESS, with the address of an interface that they reach",
        )
    return str(address)


class _Life:
    """From init to the process's end: its signals, its last words, its exit code."""

    def __init__(self, worker: RemoteWorker, home: _Home | None, store: Any) -> None:
        self._worker, self._home = worker, home
        self._store = store  # rank 0 may serve it, and others come to it later
        self._interrupts, self._pid = 0, os.getpid()

    def begin(self) -> None:
        self._hook, sys.excepthook = sys.excepthook, self._raised
        atexit.register(self._end)
        is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_usual and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: home has all end in the same step; the second time this process ends now."""
        self._interrupts += 1
        if self._home is not None:
            self._home.interrupt()
        if self._interrupts > 1:
            self._worker.is_over = True  # it may wait for an answer, which nobody will take now
            raise KeyboardInterrupt

    def _raised(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self._hook(kind, error, trace)
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        if isinstance(error, PacelineError):
            failure = messages.Failed(type(error).__name__, error.what, error.why, error.fix)
        else:
            last = traceback.format_exception_only(error)[-1].strip()
            text = "".join(traceback.format_exception(error))
            failure = messages.Failed("ScriptError", f"worker {self._worker.rank} raised {last}", traceback=text)
        with contextlib.suppress(SystemExit, PacelineError, KeyboardInterrupt):
            self._worker.broke(failure)

    def _end(self) -> None:
        if os.getpid() != self._pid:
            return  # a child that the script has forked
        code = 0
        try:
            self._worker.finish()
        except SystemExit:
            code = STOPPED
        except (PacelineError, KeyboardInterrupt):
            code = 1
        if self._home is not None:
            code = self._home.wait() or code
        if code:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
