"""A worker among processes that torchrun (or another starter that sets RANK and WORLD_SIZE) has started, on any hosts.

    rank 0's process --starts--> home: front, launcher, a deputy for every rank, each listening
            |  where they listen: the store at MASTER_ADDR:MASTER_PORT, torch's own
            v
    every rank --link--> its deputy

Home is beside rank 0. Every rank, also that one, is a worker elsewhere (``engine/elsewhere/remote.py``). Home outlives
rank 0's process: when torchrun starts its processes again, they find it and go on in the places that they had.
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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from paceline.config import Pace
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.engine.program import WAITS, Order
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.run.doors import is_insecure, own_address
from paceline.run.elsewhere import Life, meet
from paceline.transport.borrow import this_host
from paceline.transport.keys import FILE_VARIABLE, job_key, new_job_key, read_job_key

_MEET_S = 600.0  # ranks may come late: they import, or read data, before they call init
_ALIVE_S = 5.0  # a home on another host that lives answers within so long
_HOME = "import sys; sys.path.append({root!r}); from paceline.cli.home import main; main()"

_served: list[Any] = []  # the store, which rank 0 serves without an agent: who is started again asks there


class Place(msgspec.Struct, frozen=True):
    """What is published of home. ``failed``: why there is none. ``key_file``: a key made for this run, on one host.
    ``pid`` is its process on the host that calls itself ``node``."""

    job: str = ""
    host: str = ""
    ports: list[int] = []
    key_file: str = ""
    failed: str = ""
    node: str = ""
    pid: int = 0


@dataclass(frozen=True)
class _Rank:
    rank: int
    world: int
    is_one_host: bool
    master: str
    run: str
    attempt: int
    restarts: bool

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
        agent = "TORCHELASTIC_RESTART_COUNT" in environment  # without one a process may be started again by hand
        return _Rank(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"],
            environment["MASTER_ADDR"],
            environment.get("TORCHELASTIC_RUN_ID", ""),
            int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
            not agent or int(environment.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0,
        )


def join(options: Mapping[str, Any]) -> RemoteWorker:
    """Become a worker of the run that these processes are; rank 0 starts its home. Blocks until all of it is there.

    ``options``: fields of Job; those of rank 0 count. Raises HostError, ConfigError.
    """
    place = _Rank.read(os.environ)
    insecure = is_insecure(os.environ) or bool(options.get("insecure"))
    given = None if insecure else job_key(os.environ)
    if given is None and not insecure and not place.is_one_host:
        raise ConfigError(
            "workers on several hosts need a job key",
            why="without one whoever reaches the port could read and change the training",
            fix=f"paceline key job.key, copy the file to every host, set {FILE_VARIABLE}=job.key there; or "
            "PACELINE_INSECURE=1 on a network that you trust",
        )
    from torch.distributed.distributed_c10d import PrefixStore

    store = _store(place.run)
    store.set(f"host/{place.rank}", this_host())
    home: _Started | _Found | None = None
    if place.rank == 0:
        home = _find(store, place) or _start(place, options, store, insecure=insecure, has_key=given is not None)
        there = home.place
    else:
        there = msgspec.json.decode(store.get(f"home/{place.attempt}"), type=Place)
    if there.failed:
        raise HostError(f"home, beside rank 0, has not started: {there.failed}")
    if place.rank >= len(there.ports):
        raise HostError(
            f"rank is {place.rank}, and the run was started with {len(there.ports)} workers",
            fix="start as many processes as at first: torchrun --nnodes N, not MIN:MAX",
        )
    key = given or (read_job_key(there.key_file) if there.key_file else None)
    hosts = [store.get(f"host/{rank}").decode() for rank in range(place.world)]
    around = Around(hosts, PrefixStore(f"attempt/{place.attempt}", store))
    worker = meet(place.rank, place.attempt, there.job, (there.host, there.ports[place.rank]), key, around)
    Life(worker, home, may_come_again=place.restarts).begin()
    return worker


def _store(run: str) -> Any:
    """Torch's store of these processes, as ``init_process_group`` would have it: the agent's under torchrun, else one
    that rank 0 serves and shares with whoever asks in its process. What was said in it before a restart is there."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_S)))
    except Exception as error:  # noqa: BLE001  torch raises several kinds, of its own too
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise HostError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}") from None
    while isinstance(store, PrefixStore):  # torch has one for each attempt
        store = store.underlying_store
    _served.append(store)
    return PrefixStore(f"paceline/{run}", store)


def _publish(store: Any, rank: _Rank, place: Place) -> None:
    for name in (f"home/{rank.attempt}", "home"):
        store.set(name, msgspec.json.encode(place))


# --- home ---


def _find(store: Any, rank: _Rank) -> _Found | None:
    """The home that an attempt before this one has started, if it lives."""
    if not rank.attempt or not store.check(["home"]):
        return None
    place = msgspec.json.decode(store.get("home"), type=Place)
    if place.failed or not _lives(place):
        return None
    _publish(store, rank, place)
    return _Found(place)


def _lives(place: Place) -> bool:
    if place.node == socket.gethostname():
        with contextlib.suppress(OSError):
            return b"paceline.cli.home" in Path(f"/proc/{place.pid}/cmdline").read_bytes()
        return False
    with contextlib.suppress(OSError):
        socket.create_connection((place.host, place.ports[0]), _ALIVE_S).close()
        return True
    return False


class _Found:
    """A home that another process has started."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.place.node == socket.gethostname():
                os.kill(self.place.pid, signal.SIGINT)

    def wait(self) -> int:
        """Only its own parent is told the exit code; the run's end was told by the deputy."""
        if self.place.node == socket.gethostname():
            with contextlib.suppress(OSError):
                ended = os.pidfd_open(self.place.pid)
                select.select([ended], [], [])
                os.close(ended)
        if self.place.key_file:
            shutil.rmtree(Path(self.place.key_file).parent, ignore_errors=True)
        return 0


class _Started:
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


def _start(rank: _Rank, options: Mapping[str, Any], store: Any, *, insecure: bool, has_key: bool) -> _Started:
    """Raises HostError, and has told the other ranks why."""
    try:
        home = _start_process(rank, options, insecure=insecure, has_key=has_key)
    except PacelineError as error:
        _publish(store, rank, Place(failed=error.what))
        raise
    _publish(store, rank, home.place)
    return home


def _start_process(rank: _Rank, options: Mapping[str, Any], *, insecure: bool, has_key: bool) -> _Started:
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
        workers=rank.world,
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
    host, ports = _read_report(process, readable, rank.world)
    place = Place(order.job, host, ports, key_file, node=socket.gethostname(), pid=process.pid)
    return _Started(process, place)


def _read_report(process: subprocess.Popen[bytes], readable: int, world: int) -> tuple[str, list[int]]:
    """The address and the ports, by rank, when all deputies listen."""
    with os.fdopen(readable) as lines:
        host, *ports = lines.readline().split() or [""]
        ranks: set[int] = set()
        while len(ranks) < world:
            line = lines.readline()
            if not line:
                code = process.wait()
                raise HostError(f"it ended with exit code {code}; what it said stands above")
            rank, what = line.split()
            if what == WAITS:
                ranks.add(int(rank))
    return host, [int(port) for port in ports]


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
