"""`paceline doctor`: what this machine has for training, and what a link to another one can do.

Every finding is a line with what to do about it. Nothing is changed; a probe of a port or of memory is given back.
"""

from __future__ import annotations

import os
import platform
import queue
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from paceline import __version__
from paceline.errors import HostError, PacelineError
from paceline.protocol.link import Peer
from paceline.transport import interfaces, segment
from paceline.transport.connect import connect
from paceline.transport.ends import End, Ended, Joined, LinkEnded, Received
from paceline.transport.keys import FILE_VARIABLE, job_key
from paceline.transport.link import Link
from paceline.transport.listener import Listener, listening
from paceline.transport.tls import Credentials

OK, ADVICE, TROUBLE = "ok", "advice", "trouble"
_JOB = "doctor"
_PIECE_BYTES = 2**20
_PIECES = 64  # there, and as many back
_PINGS = 100
_ANSWER_S = 30.0


class Probe(msgspec.Struct, frozen=True, tag_field="t", tag=1, array_like=True):
    """The doctor says ... here is something; send ``pieces`` pieces back when you have it."""

    pieces: int = 0


class Answer(msgspec.Struct, frozen=True, tag_field="t", tag=2, array_like=True):
    """The other side says ... here is one of them. ``version`` is that of its paceline. No answer."""

    version: str


@dataclass(frozen=True)
class Finding:
    """``fix`` is empty where nothing is to be done."""

    what: str
    told: str
    state: str = OK
    fix: str = ""


def examine(environment: Mapping[str, str], folder: Path, port: int = 0, interface: str | None = None) -> list[Finding]:
    """Everything about this machine; about two seconds, for importing torch."""
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "cores": _cores,
        "memory": _memory,
        "shared memory": _shared_memory,
        "files": _files,
        "accelerators": _accelerators,
        "interface": lambda: _interface(interface),
        "port": lambda: _port(port),
        "clock": _clock,
        "disk": lambda: _disk(folder),
        "job key": lambda: _key(environment),
    }
    return [_checked(what, check) for what, check in checks.items()]


def _checked(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except PacelineError as error:
        return Finding(what, error.what, TROUBLE, error.fix)


def _versions() -> Finding:
    found = {name: _version(name) for name in ("torch", "numpy", "msgspec", "cryptography")}
    told = ", ".join(
        [f"paceline {__version__}", f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in found.items())]
    )
    missing = [name for name, version in found.items() if version == "missing"]
    if missing:
        return Finding("versions", told, TROUBLE, f"pip install {' '.join(missing)}")
    if platform.system() != "Linux":
        return Finding("versions", f"{told}, {platform.system()}", TROUBLE, "train on several processes under Linux")
    return Finding("versions", told)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _cores() -> Finding:
    mine, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    told = f"{mine} of {os.cpu_count()} for this process, load {load:.1f}"
    if load > mine:
        return Finding("cores", told, ADVICE, "other programs want them too: stop those, or measure nothing now")
    return Finding("cores", told)


def _memory() -> Finding:
    free = segment.available_bytes()
    told = f"{free / 1e9:.1f} GB can be had"
    if free < 10**9:
        return Finding("memory", told, ADVICE, "a worker takes about 0.3 GB beside its model: use few, or free some")
    return Finding("memory", told)


def _shared_memory() -> Finding:
    os.close(segment.create("doctor", 2**20))
    return Finding("shared memory", "can be made and reserved (memfd, posix_fallocate)")


def _files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{soft} descriptors a process (at most {hard})"
    return Finding("files", told, ADVICE, "ulimit -n 4096") if soft < 1024 else Finding("files", told)


def _accelerators() -> Finding:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if names:
        return Finding("accelerators", ", ".join(names))
    if Path("/dev/nvidiactl").exists():
        fix = "install a build of torch for CUDA, or a driver that fits it: python -m torch.utils.collect_env"
        return Finding("accelerators", f"there is one, but torch {torch.__version__} does not see it", ADVICE, fix)
    return Finding("accelerators", f"none; the CPU has {torch.backends.cpu.get_cpu_capability()}")


def _interface(wanted: str | None) -> Finding:
    try:
        route = interfaces.default_route(Path("/proc/net/route").read_text())
    except OSError:
        route = None
    found = interfaces.advertised(interfaces.of_this_machine(), wanted, route)
    told = f"others are told {found.address}: {found.reason}"
    if found.interface == "lo":
        return Finding("interface", told, ADVICE, "for several hosts, bring one up or name it with --interface")
    return Finding("interface", told)


def _port(port: int) -> Finding:
    with listening("", port) as sock:
        return Finding("port", f"{sock.getsockname()[1]} can be listened at")


def _clock() -> Finding:
    now = datetime.now(UTC)
    told = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if not 2025 <= now.year < 2100:
        return Finding("clock", told, TROUBLE, "set it: certificates are valid from 2020 to 2100")
    return Finding("clock", told)


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    told = f"{free / 1e9:.1f} GB free for {folder}"
    if not os.access(there, os.W_OK):
        return Finding("disk", f"{there} cannot be written to", TROUBLE, "choose another --run-dir")
    return (
        Finding("disk", told, ADVICE, "free some, or choose another --run-dir")
        if free < 10**9
        else Finding("disk", told)
    )


def _key(environment: Mapping[str, str]) -> Finding:
    key = job_key(environment)
    if key is None:
        return Finding("job key", f"none; training on several hosts needs one ({FILE_VARIABLE})")
    Credentials.issue(key)
    return Finding("job key", f"there, fingerprint {key.fingerprint}")


class Station:
    """One side of a measurement. ``environment`` has the job key, unless it is to be ``insecure``."""

    def __init__(self, environment: Mapping[str, str], *, insecure: bool = False) -> None:
        key = None if insecure else job_key(environment)
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._memory = memoryview(bytearray(_PIECE_BYTES))
        self.end = End(
            me=Peer(os.getpid(), "doctor"),
            job=_JOB,
            messages=Probe | Answer,
            sink=self._events.put,
            place=self._place,
            credentials=None if key is None else Credentials.issue(key),
            insecure=insecure,
        )

    def _place(self, link: Link, message: Any, size_bytes: int) -> memoryview | None:
        return self._memory[:size_bytes] if size_bytes <= _PIECE_BYTES else None

    def answer(self, on_joined: Callable[[], None], links: int | None = None) -> None:
        """Answers whoever comes, until Ctrl-C or until so many have gone again."""
        while links is None or links > 0:
            match self._events.get():
                case Joined():
                    on_joined()
                case Received(link, Probe(pieces)):
                    with suppress(LinkEnded):  # its Ended is on its way
                        link.send(Answer(__version__))
                        for _ in range(min(pieces, _PIECES)):
                            link.send(Answer(__version__), self._memory)
                case Ended():
                    links = None if links is None else links - 1

    def measure(self, host: str, port: int, timeout_s: float = 10.0) -> list[Finding]:
        """Handshake, round trip and both directions to a `paceline doctor --listen`. Raises HostError."""
        link = connect(self.end, (host, port), timeout_s)
        try:
            version, trips_s = "", []
            for _ in range(_PINGS):
                began_s = time.perf_counter()
                version = self._ask(link, Probe(), 0)
                trips_s.append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
            for _ in range(_PIECES):
                sent = link.send(Probe(), self._memory)
            sent.wait(_ANSWER_S)
            there_s = time.perf_counter() - began_s
            self._take(_PIECES)
            began_s = time.perf_counter()
            self._ask(link, Probe(_PIECES), _PIECES)
            back_s = time.perf_counter() - began_s
        finally:
            link.close()
        size_mb = _PIECES * _PIECE_BYTES / 1e6
        how = "TLS 1.3, both sides have the job key" if self.end.credentials else "plain text, nobody is checked"
        fix = "" if version == __version__ else f"install one version on all hosts; here it is {__version__}"
        return [
            Finding("link", f"{host}:{port} answers; {how}"),
            Finding("peer", f"paceline {version}", ADVICE if fix else OK, fix),
            Finding("round trip", f"{median(trips_s) * 1e3:.2f} ms (median of {len(trips_s)})"),
            Finding("bandwidth", f"{size_mb / there_s:,.0f} MB/s there, {size_mb / back_s:,.0f} MB/s back"),
        ]

    def _ask(self, link: Link, probe: Probe, pieces: int) -> str:
        link.send(probe)
        return self._take(1 + pieces)

    def _take(self, count: int) -> str:
        """So many answers; the version in the last of them."""
        version = ""
        while count:
            try:
                event = self._events.get(timeout=_ANSWER_S)
            except queue.Empty:
                raise HostError(f"the other side has not answered for {_ANSWER_S:g} s") from None
            match event:
                case Received(_, Answer(version), _):
                    count -= 1
                case Ended(_, reason):
                    raise HostError(f"the link has ended: {reason}")
        return version


def open_door(station: Station, port: int, on_refused: Callable[[str], None]) -> Listener:
    """Raises HostError if the port is in use."""
    return Listener(station.end, port=port, on_refused=on_refused)
