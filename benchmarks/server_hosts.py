"""Servers on one host or on several, without workers there: what a parameter server's traffic costs, and spreads.

    python -m benchmarks.server_hosts --hosts 1,2 --workers 4 --paces async,sync

Needs root, ``ip`` and ``tc``: as hosts.py, whose teams these are. Workers have a host each, servers as many hosts as
told; every interface is slowed in both directions. With one, all gradients come in and all parameters go out through
one interface; with two, half of them each. Ratios are of slices of one round, to the servers on as many hosts as comes
first.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.hosts import HostTeam
from benchmarks.jobs import JOBS, find_job
from benchmarks.one_host import cores_apart, names, positive, ratios, spread
from benchmarks.rivals import Way
from benchmarks.teams import TeamError
from paceline.transport.keys import new_job_key
from tests.hosts.namespaces import Host, missing, some_hosts

_PORT = 29800


@dataclass(frozen=True)
class _Place:
    """``servers`` on the first of these hosts, and a worker on each of the others."""

    servers: int
    hosts: Sequence[Host]
    on: int


class ServersTeam(HostTeam):
    """The processes of one way: workers, which train slices, and those beside servers, which wait for the end."""

    def __init__(self, way: Way, job: str, directory: Path, place: _Place, port: int) -> None:
        self._place = place
        super().__init__(way, job, directory, place.hosts, port)
        self._processes += [self._begin(job, rank) for rank in range(place.on)]

    def _start(self, job: str, rank: int) -> subprocess.Popen[bytes]:
        return self._begin(job, self._place.on + rank)

    def _begin(self, job: str, rank: int) -> subprocess.Popen[bytes]:
        place = self._place
        told = {
            "PACELINE_SERVERS": str(place.servers),
            "PACELINE_SERVERS_APART": "1",
            "PACELINE_SERVER_HOSTS": str(place.on),
            "PACELINE_PACE": self.way.pace,
        }
        return self._start_on(place.hosts[rank], job, rank, len(place.hosts), 1, **told)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--workers", type=positive(int), default=4, help="a host each (default 4)")
    parser.add_argument("--servers", type=positive(int), help="in all (default: as many as the most hosts)")
    parser.add_argument("--paces", type=lambda text: text.split(","), default=["async", "sync"])
    parser.add_argument("--jobs", type=names(JOBS), default=["mlp", "sparse"], help=f"of {','.join(JOBS)}")
    parser.add_argument("--rate", default="1gbit", help="as tc has it (default 1gbit)")
    parser.add_argument("--rounds", type=positive(int), default=5, help="slices of each (default 5)")
    parser.add_argument("--seconds", type=positive(float), default=2.0, help="of a slice (default 2)")
    parser.add_argument("--tls", action="store_true", help="with TLS, as users have it")
    options = parser.parse_args(argv)
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.sched_setaffinity(0, cores_apart())
    try:
        with some_hosts(max(options.hosts) + options.workers) as hosts:
            for host in hosts:
                host.slow(options.rate)
            for number, (job, pace) in enumerate((job, pace) for job in options.jobs for pace in options.paces):
                print("\n".join(_measure(job, pace, hosts, options, _PORT + 10 * number)), flush=True)
    except TeamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(job: str, pace: str, hosts: Sequence[Host], options: Any, port: int) -> list[str]:
    """Lines to print. Raises TeamError."""
    rates: dict[int, list[float]] = {count: [] for count in options.hosts}
    most = max(options.hosts)
    with tempfile.TemporaryDirectory(prefix="servers-") as directory, ExitStack() as stack:
        new_job_key(Path(directory) / "job.key")
        teams = {}
        for place, count in enumerate(options.hosts):
            folder = Path(directory) / str(count)
            folder.mkdir()
            (folder / "job.key").write_bytes((Path(directory) / "job.key").read_bytes())
            (folder / "job.key").chmod(0o600)
            way = Way("tls" if options.tls else "plain", "paceline", "elsewhere", workers=options.workers, pace=pace)
            used = [*hosts[:count], *hosts[most:]]
            at = _Place(options.servers or most, used, count)
            teams[count] = stack.enter_context(ServersTeam(replace(way), job, folder, at, port + place))
            teams[count].ready()
        for team in teams.values():
            team.warm_up(options.seconds)
        for number in range(options.rounds):
            for count in options.hosts[number % len(teams) :] + options.hosts[: number % len(teams)]:
                rates[count].append(teams[count].slice(options.seconds) * find_job(job).samples)
    first = options.hosts[0]
    lines = [f"\n{job}, {pace}, {options.workers} workers, {options.servers or most} servers, {options.rate}"]
    for count, own in rates.items():
        line = f"on {count} host{'s' if count > 1 else ''}{median(own):12,.0f} samples/s"
        if count != first:
            x = spread(ratios(own, rates[first]))
            line += f"{x.median:8.2f} x ({x.lower_quartile:.2f}), {x.min:.2f} to {x.max:.2f}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
