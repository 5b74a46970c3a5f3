"""The home that rank 0 starts beside itself, or finds there when it is started again; what all ranks are told of it.

It is a process of its own, in a session of its own, so it outlives rank 0's. Which ranks are workers is settled with
it: all of them, or all but those of its host, and of the other hosts of servers (``--servers-apart``).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from paceline.config import Pace
from paceline.engine.program import STARTED, WAITS, Doors, Order
from paceline.errors import HostError, PacelineError
from paceline.events import RunInfo
from paceline.run.doors import own_address
from paceline.transport.borrow import this_host
from paceline.transport.keys import FILE_VARIABLE, new_job_key

_ALIVE_S = 5.0  # a home on another host that lives answers within so long
_KILLED = 1  # the exit code of a run whose home has not left one
_HOME = "import sys; sys.path.append({root!r}); from paceline.cli.home import main; main()"


class Place(msgspec.Struct, frozen=True):
    """What is published of home. ``failed``: why there is none. ``key_file``: a key made for this run, on one host.
    ``pid`` is its process on the host that calls itself ``node``, ``directory`` the run's there. ``apart``: of these
    hosts (``this_host``), home's first, no rank is a worker: they have the servers, whose deputies listen at
    ``server_ports``, 0 for one at home."""

    job: str = ""
    host: str = ""
    ports: list[int] = []
    key_file: str = ""
    failed: str = ""
    node: str = ""
    pid: int = 0
    directory: str = ""
    apart: list[str] = []
    server_ports: list[int] = []

    def workers(self, hosts: Sequence[str]) -> list[int]:
        """Which of the ranks are workers, in order; ``hosts``: on which each rank is."""
        return [rank for rank, host in enumerate(hosts) if host not in self.apart]

    def servers(self, hosts: Sequence[str]) -> dict[int, int]:
        """Which of the ranks are servers elsewhere: so many of each server host's as it has servers, in order."""
        found: dict[int, int] = {}
        for place, host in enumerate(self.apart[1:], 1):
            ranks = [rank for rank, there in enumerate(hosts) if there == host]
            found |= zip(ranks, range(place, len(self.server_ports), len(self.apart)), strict=False)
        return found

    @property
    def exit_code(self) -> int | None:
        """The run's, once it is over; for processes of its host."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((Path(self.directory) / "run.json").read_bytes(), type=RunInfo).exit_code
        return None


@dataclass(frozen=True)
class Rank:
    """What the environment tells of this process. ``attempt``: how often its host's have been started again;
    ``restarts``: may that be?"""

    rank: int
    world: int
    is_one_host: bool
    master: str
    run: str
    attempt: int
    restarts: bool

    @staticmethod
    def read(environment: Mapping[str, str]) -> Rank:
        """Raises HostError where the environment is only half of one."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise HostError(
                f"WORLD_SIZE is {environment.get('WORLD_SIZE')}, but {', '.join(missing)} is not set",
                fix="torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or: paceline run SCRIPT --workers N",
            )
        agent = "TORCHELASTIC_RESTART_COUNT" in environment  # without one a process may be started again by hand
        return Rank(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
            environment["MASTER_ADDR"],
            environment.get("TORCHELASTIC_RUN_ID", ""),
            int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
            not agent or int(environment.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0,
        )


# --- found ---


def known(store: Any) -> Place | None:
    """The home that has been published, if it lives; or if its run has come to a good end with nobody of its host."""
    if not store.check(["home"]):
        return None
    place = msgspec.json.decode(store.get("home"), type=Place)
    is_done = place.apart[:1] == [this_host()] and place.exit_code == 0
    return place if not place.failed and (is_done or _lives(place)) else None


def publish(store: Any, rank: Rank, place: Place) -> None:
    for name in (f"home/{rank.attempt}", "home"):
        store.set(name, msgspec.json.encode(place))


def _lives(place: Place) -> bool:
    if place.node == socket.gethostname():
        with contextlib.suppress(OSError):
            return b"paceline.cli.home" in Path(f"/proc/{place.pid}/cmdline").read_bytes()
        return False
    for port in place.ports:  # a worker may be lost, and its next deputy not be there yet
        with contextlib.suppress(ConnectionRefusedError):
            try:
                socket.create_connection((place.host, port), _ALIVE_S).close()
            except TimeoutError:
                return False
            return True
    return False


class Found:
    """A home that another process has started."""

    def __init__(self, place: Place, *, interrupts: bool = True) -> None:
        """``interrupts``: does this process pass Ctrl-C on to it?"""
        self.place, self._interrupts = place, interrupts
        self._is_here, self._ended = place.node == socket.gethostname(), -1
        if self._is_here and _lives(place):
            with contextlib.suppress(OSError):
                self._ended = os.pidfd_open(place.pid)

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._interrupts and self._ended >= 0:
                signal.pidfd_send_signal(self._ended, signal.SIGINT)

    def wait(self) -> int:
        """0 from another host: there the run's end was told by the deputy."""
        if self._ended >= 0:
            select.select([self._ended], [], [])
        if self.place.key_file:
            shutil.rmtree(Path(self.place.key_file).parent, ignore_errors=True)
        code = self.place.exit_code if self._is_here else 0
        return _KILLED if code is None else code


# --- started ---


class Started:
    """A home that this process has started."""

    def __init__(self, process: subprocess.Popen[bytes], place: Place) -> None:
        self._process, self.place = process, place

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        code = self._process.wait()
        if self.place.key_file:
            shutil.rmtree(Path(self.place.key_file).parent, ignore_errors=True)
        return code


def start(
    rank: Rank, hosts: Sequence[str], options: Mapping[str, Any], store: Any, *, insecure: bool, has_key: bool
) -> Started:
    """``hosts``: on which each rank is. Raises HostError, and has told the other ranks why."""
    try:
        home = _start_process(rank, hosts, options, insecure=insecure, has_key=has_key)
    except PacelineError as error:
        publish(store, rank, Place(failed=error.what))
        raise
    publish(store, rank, home.place)
    return home


def _start_process(
    rank: Rank, hosts: Sequence[str], options: Mapping[str, Any], *, insecure: bool, has_key: bool
) -> Started:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    key_file = ""
    if not insecure and not has_key:
        # On one host: who can read the file may do all that this user may; the store, which asks nobody who he is,
        # learns its name only.
        environment[FILE_VARIABLE] = key_file = str(Path(tempfile.mkdtemp(prefix="paceline-")) / "job.key")
        new_job_key(key_file)
    readable, writable = os.pipe()
    order = Order(
        script=str(Path(sys.argv[0]).resolve()),
        args=sys.argv[1:],
        hosts=list(Counter(hosts).values()),  # in the order of their first ranks
        options={name: str(value) if isinstance(value, Pace | Path) else value for name, value in options.items()},
        restarts=rank.restarts,
        host="127.0.0.1" if rank.is_one_host else _address(rank.master),
        job=os.urandom(8).hex(),
        starter=os.getpid(),
        report=writable,
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _HOME.format(root=str(Path(__file__).resolve().parent.parent.parent))],
        stdin=subprocess.PIPE,
        pass_fds=(writable,),
        env=environment,
        start_new_session=True,  # what is sent to the group of the ranks is not meant for it
    )
    os.close(writable)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(msgspec.json.encode(order))
        process.stdin.close()
    return Started(process, _read_report(process, readable, Place(order.job, key_file=key_file), hosts))


def _read_report(process: subprocess.Popen[bytes], readable: int, place: Place, hosts: Sequence[str]) -> Place:
    """Of that process, when all deputies listen. ``hosts``: on which each rank is. Raises HostError."""
    directory = ""
    with os.fdopen(readable) as lines:
        first = lines.readline()
        doors = msgspec.json.decode(first, type=Doors) if first else Doors("", (), (), 0)
        missing = {str(rank) for rank in range(len(doors.ports))}
        missing |= {f"s{server}" for server, port in enumerate(doors.server_ports) if port}
        while not directory or missing:
            line = lines.readline()
            if not line:
                code = process.wait()
                raise HostError(f"it ended with exit code {code}; what it said stands above")
            if line.startswith(STARTED):
                directory = line.removeprefix(STARTED).strip()
                continue
            who, what = line.split()
            if what == WAITS:
                missing.discard(who)
    return msgspec.structs.replace(
        place,
        host=doors.host,
        ports=list(doors.ports),
        server_ports=list(doors.server_ports),
        node=socket.gethostname(),
        pid=process.pid,
        directory=directory,
        apart=list(dict.fromkeys(hosts))[: doors.without_workers],
    )


def _address(master: str) -> str:
    """The address of this host that MASTER_ADDR means. Raises HostError."""
    try:
        address = str(socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise HostError(f"MASTER_ADDR is {master}, which is no name of an address: {error.strerror}") from None
    if address != master and _is_loopback(address):
        address = own_address(None).address  # many a host has its own name for an address of the loopback
    if _is_loopback(address):
        raise HostError(
            f"MASTER_ADDR is {master}, which is {address} here: other hosts do not reach it",
            fix="torchrun --master-addr ADDRESS, with the address of an interface that they reach",
        )
    return address


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
