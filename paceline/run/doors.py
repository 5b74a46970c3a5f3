"""Home's side of workers elsewhere, whoever starts them: the address and the ports that they come to, and the job key.

Imports no torch: the process that has this only starts and shows a run.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from paceline.config import Job
from paceline.errors import ConfigError
from paceline.transport.interfaces import Advertised, advertised, default_route, of_this_machine
from paceline.transport.keys import FILE_VARIABLE, VARIABLE, new_job_key
from paceline.transport.listener import hold


def own_address(wanted: str | None) -> Advertised:
    """The address of this host that others are told: that of interface ``wanted``, or of the default route. Raises
    HostError."""
    try:
        route = default_route(Path("/proc/net/route").read_text())
    except OSError:
        route = None
    return advertised(of_this_machine(), wanted, route)


def hold_ports(host: str, job: Job) -> list[socket.socket]:
    """A port for each place, then for each server elsewhere, from the job's on (0: any that are free), until these are
    closed. Raises HostError."""
    count = job.places + len(job.servers_elsewhere)
    return [hold(host, job.port + place if job.port else 0) for place in range(count)]


def ports_of(job: Job, held: Sequence[socket.socket]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of those held: workers' by rank, and servers' by number, 0 for one at home."""
    ports = [sock.getsockname()[1] for sock in held]
    elsewhere = dict(zip(job.servers_elsewhere, ports[job.places :], strict=True))
    return tuple(ports[: job.places]), tuple(elsewhere.get(server, 0) for server in range(job.servers))


def told(host: str, why: str, held: list[socket.socket], *, insecure: bool) -> str:
    """Where workers come to, as a line for the user."""
    ports = [sock.getsockname()[1] for sock in held]
    which = f"ports {ports[0]} to {ports[-1]}" if ports == list(range(ports[0], ports[0] + len(ports))) else "any ports"
    return f"home is at {host}, {why}; {which}; {'plain text' if insecure else 'TLS 1.3'}"


def warn_insecure() -> None:
    sys.stderr.write(
        "paceline: PACELINE_INSECURE is set: links are neither encrypted nor authenticated; whoever reaches the "
        "ports can read and change the training\n"
    )


@contextmanager
def key_in_file(environment: MutableMapping[str, str]) -> Iterator[str]:
    """A key of its own for a run that was not given one, named in the environment; the file's path, "" if it was.

    Who can read the file may do all that this user may.
    """
    if environment.get(FILE_VARIABLE) or environment.get(VARIABLE):
        yield ""
        return
    folder = tempfile.mkdtemp(prefix="paceline-")
    path = environment[FILE_VARIABLE] = str(Path(folder) / "job.key")
    try:
        new_job_key(path)
        yield path
    finally:
        environment.pop(FILE_VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)


def is_insecure(environment: Mapping[str, str]) -> bool:
    """Are links to be in plain text? Raises ConfigError where a key was given too."""
    name = "PACELINE_INSECURE"
    text = environment.get(name, "").strip().lower()
    if text not in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        raise ConfigError(f"{name} is {text!r}; it must be 1 or 0")
    insecure = text in ("1", "true", "yes", "on")
    if insecure and (environment.get(FILE_VARIABLE) or environment.get(VARIABLE)):
        raise ConfigError(f"{name} is set, and a job key too", fix="unset one of them")
    return insecure
