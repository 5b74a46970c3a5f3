"""Training across hosts, beside DDP on gloo, and what a link moves beside bare sockets; hosts are network namespaces.

    python -m benchmarks.hosts --json
    python -m benchmarks.hosts --hosts 2 --workers 2 --rates 1gbit --jobs mlp,gpt --rounds 5

Needs root, ``ip`` and ``tc``. Every host has an interface on a bridge, slowed in both directions to the rate given. As
in one_host.py every way has its processes started once and asleep while another is measured, a round gives each way a
slice, and ratios are of slices of one round. Reported are medians, lower quartile and range. DDP has no encryption, so
it compares with ``plain``; ``tls`` is what users get.

*wire* is how busy the busiest direction of the first host's interface was, as a share of what one bare TCP socket
drives through it, by the kernel's count of bytes; *all*, of what one drives while every host has one that drives to the
next: as much as these processors carry for so many, if they do nothing else. *apart* are processes that share nothing:
what the others may come to where what is sent costs nothing.
*push/pull* sends so many bytes and takes as many back, by a link and by a bare socket (TCP for plain, TLS for tls) in
turns.

All workers, of all hosts, share this machine's two cores, one thread each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import wire
from benchmarks.jobs import JOBS, find_job
from benchmarks.one_host import Spread, cores_apart, names, positive, ratios, spread
from benchmarks.rivals import Way
from benchmarks.teams import ROOT, Team, TeamError
from paceline.transport.keys import FILE_VARIABLE, new_job_key
from tests.hosts.namespaces import Host, missing, some_hosts

_DDP, _APART = "ddp", "apart"
_STARTED = {_APART: "ceiling"}  # as rivals.py has it
_WAYS = {
    _DDP: Way(_DDP, "DistributedDataParallel, gloo", "ddp"),
    "plain": Way("plain", "paceline sync, no encryption", "elsewhere"),
    "tls": Way("tls", "paceline sync, TLS 1.3", "elsewhere"),
    _APART: Way(_APART, "processes that share nothing", "apart"),
}
_JOBS = ("mlp", "gpt", "sparse")
_PORT, _ports = 29600, itertools.count()  # a store may outlive its job for a moment
_SIZES_MB = (25.0, 100.0)
_LEAST_S = 1.0  # a bare socket is measured for so long


@dataclass(frozen=True)
class Row:
    """One way on one job. ``x_ddp``: times DDP's rate in the same round. The others: see the module's docstring."""

    samples_per_s: list[float]
    x_ddp: Spread | None
    wire: Spread
    all: Spread


@dataclass(frozen=True)
class Table:
    job: str
    hosts: int
    workers: int
    rate: str
    bare_mb_s: tuple[float, float]  # alone, and with all hosts at once
    rows: dict[str, Row]


class HostTeam(Team):
    """The processes of one way, ``workers`` on each host."""

    def __init__(self, way: Way, job: str, directory: Path, hosts: Sequence[Host], port: int) -> None:
        self._hosts, self._port, self._directory = hosts, port, directory
        super().__init__(way, job, directory)

    def _start(self, job: str, rank: int) -> subprocess.Popen[bytes]:
        each = self.way.workers // len(self._hosts)
        return self._start_on(self._hosts[rank // each], job, rank, self.way.workers, each)

    def _start_on(
        self, host: Host, job: str, rank: int, world: int, each: int, **variables: str
    ) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": host.interface,
            "PYTHONPATH": ROOT,
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(each),
            "MASTER_ADDR": self._hosts[0].address,
            "MASTER_PORT": str(self._port),
            "PACELINE_RUNS": str(self._directory / "runs"),
        }
        if self.way.name == "tls":
            environment[FILE_VARIABLE] = str(self._directory / "job.key")
        else:
            environment["PACELINE_INSECURE"] = "1"
        environment |= variables
        with self._log(rank).open("wb") as log:
            return subprocess.Popen(
                [
                    *host.inside,
                    *(sys.executable, "-m", "benchmarks.rivals"),
                    *(
                        f"{_STARTED.get(self.way.kind, self.way.kind)}@{self.way.workers}",
                        job,
                        str(rank),
                        str(self._path),
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                env=environment,
            )

    def _signal_restless(self, number: signal.Signals) -> None:
        """Nobody is stopped: links would be given up, and what looks around does so 10 times a second."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    why = missing()
    cores = cores_apart()
    if why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.sched_setaffinity(0, cores)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(cores),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    tables: list[Table] = []
    moved: dict[str, list[wire.Row]] = {}
    try:
        for count in options.hosts:
            with some_hosts(count) as hosts:
                for rate in options.rates:
                    for host in hosts:
                        host.slow(rate)
                    bare_mb_s = _in_child(_bare_rates, hosts)
                    if options.sizes and count == min(options.hosts):
                        moved[rate] = _in_child(_push_and_pull, hosts, options.sizes, options.rounds)
                        print(f"\n{rate}: push and pull\n" + "\n".join(_wire_lines(moved[rate])), flush=True)
                    for job in options.jobs:
                        table = _measure(job, hosts, options, rate, bare_mb_s)
                        tables.append(table)
                        print("\n".join(_lines(table)), flush=True)
    except TeamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        told = {rate: [asdict(row) for row in rows] for rate, rows in moved.items()}
        print(json.dumps({"machine": machine, "push_pull": told, "jobs": [asdict(table) for table in tables]}))
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=_numbers(int), default=[2, 4], help="how many (default 2,4)")
    parser.add_argument("--workers", type=positive(int), default=1, help="of each host (default 1)")
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["1gbit", "100mbit"], help="as tc has it")
    parser.add_argument("--jobs", type=names(JOBS), default=list(_JOBS), help=f"of {','.join(JOBS)}")
    parser.add_argument("--clip", type=positive(float), help="clip gradients to this norm, with every way")
    parser.add_argument("--rows", type=names(_WAYS), default=list(_WAYS), help=f"of {','.join(_WAYS)}")
    parser.add_argument("--rounds", type=positive(int), default=5, help="slices of each way (default 5)")
    parser.add_argument("--seconds", type=positive(float), default=2.0, help="of a slice (default 2)")
    parser.add_argument("--sizes", type=_numbers(float), default=_SIZES_MB, help="of push/pull, MB; 0: none")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object in the last line")
    options = parser.parse_args(argv)
    options.sizes = [size for size in options.sizes if size]
    if options.clip is not None:
        options.jobs = [f"{job}@{options.clip:g}" for job in options.jobs]
    return options


def _numbers(kind: type[int] | type[float]) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


# --- jobs ---


def _measure(job: str, hosts: Sequence[Host], options: Any, rate: str, bare_mb_s: tuple[float, float]) -> Table:
    """Raises TeamError."""
    rates: dict[str, list[float]] = {way: [] for way in options.rows}
    busy: dict[str, list[float]] = {way: [] for way in options.rows}
    workers = len(hosts) * options.workers
    with tempfile.TemporaryDirectory(prefix="hosts-") as directory, ExitStack() as stack:
        new_job_key(Path(directory) / "job.key")
        teams = []
        for way in options.rows:
            port = _PORT + next(_ports)
            team = HostTeam(replace(_WAYS[way], workers=workers), job, Path(directory), hosts, port)
            teams.append(stack.enter_context(team))
            team.ready()
        for team in teams:
            team.warm_up(options.seconds)
        for number in range(options.rounds):
            first = number % len(teams)
            for team in teams[first:] + teams[:first]:
                before, begun_s = _carried(hosts[0]), time.monotonic()
                rates[team.way.name].append(team.slice(options.seconds) * find_job(job).samples)
                took_s = time.monotonic() - begun_s
                most = max(b - a for a, b in zip(before, _carried(hosts[0]), strict=True))
                busy[team.way.name].append(most / took_s / 1e6)
    rows = {}
    for way, own in rates.items():
        x_ddp = spread(ratios(own, rates[_DDP])) if _DDP in rates else None
        wires = [spread([moved / most for moved in busy[way]]) for most in bare_mb_s]
        rows[way] = Row([round(rate, 2) for rate in own], x_ddp, *wires)
    alone, together = bare_mb_s
    return Table(job, len(hosts), options.workers, rate, (round(alone, 2), round(together, 2)), rows)


def _carried(host: Host) -> tuple[int, int]:
    """Bytes that the interface has received, and sent."""
    counts = Path(f"/sys/class/net/{host.outer}/statistics")
    return int((counts / "rx_bytes").read_text()), int((counts / "tx_bytes").read_text())


def _lines(table: Table) -> list[str]:
    each = f"{table.workers} worker{'s' if table.workers > 1 else ''} each"
    lines = [
        f"\n{table.job}, {table.hosts} hosts, {each}, {table.rate} "
        "(a bare socket moves {:.1f} MB/s, all hosts at once {:.1f} each)".format(*table.bare_mb_s),
        f"{'':38}{'samples/s':>10}{'x ddp':>8}{'lower':>7}{'range':>14}{'wire':>7}{'all':>7}",
    ]
    for way, row in table.rows.items():
        line = f"{way:8}{_WAYS[way].told:30}{median(row.samples_per_s):10,.0f}"
        if row.x_ddp is not None:
            span = f"{row.x_ddp.min:.2f}..{row.x_ddp.max:.2f}"
            line += f"{row.x_ddp.median:8.2f}{row.x_ddp.lower_quartile:7.2f}{span:>14}"
        lines.append(f"{line}{row.wire.median:7.0%}{row.all.median:7.0%}")
    return lines


# --- the wire ---


def _in_child(work: Any, hosts: Sequence[Host], *arguments: Any) -> Any:
    """What ``work(hosts, ...)`` returns in a process on the first host."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(there, hosts[0].namespace, work, hosts, *arguments))
    child.start()
    there.close()
    answer = here.recv()
    child.join()
    return answer


def _child(there: Connection, namespace: str, work: Any, *arguments: Any) -> None:
    wire.enter(namespace)
    there.send(work(*arguments))


def _bare_rates(hosts: Sequence[Host]) -> tuple[float, float]:
    """MB/s that one TCP socket drives out of the first host's interface, by the kernel's count: alone, and while every
    other host has one that drives as much as it can to the next."""
    with _other_end(hosts, _take_all) as taking:
        alone = _drive(taking, hosts[0])
        with ExitStack() as others:
            for number in range(1, len(hosts)):
                others.enter_context(_pair(hosts, number, (number + 1) % len(hosts)))
            return alone, _drive(taking, hosts[0])


@contextmanager
def _pair(hosts: Sequence[Host], giver: int, taker: int) -> Iterator[None]:
    """While a socket of one host drives as much as it can to another."""
    context = multiprocessing.get_context("fork")  # this process is one thread, and has imported what takes seconds
    here, there = context.Pipe()
    taking = context.Process(target=_take_from_one, args=(hosts[taker].namespace, hosts[taker].address, there))
    taking.start()
    giving = context.Process(target=_give_all, args=(hosts[giver].namespace, hosts[taker].address, here.recv()))
    giving.start()
    try:
        yield
    finally:
        for one in (giving, taking):
            one.terminate()
            one.join()


def _take_from_one(namespace: str, host: str, there: Connection) -> None:
    """Tells at which port."""
    wire.enter(namespace)
    with socket.create_server((host, 0)) as door:
        there.send(door.getsockname()[1])
        sock, _ = door.accept()
        with sock:
            _drain(sock)


@contextmanager
def _other_end(hosts: Sequence[Host], work: Callable[..., None]) -> Iterator[socket.socket]:
    """A socket to a process on the second host that does ``work`` until the socket is closed."""
    with socket.create_server((hosts[0].address, 0)) as door:
        arguments = (hosts[1].namespace, hosts[0].address, door.getsockname()[1])
        process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        process.start()
        sock, _ = door.accept()
    with sock:
        yield sock
        sock.shutdown(socket.SHUT_RDWR)
    process.join()


def _drive(sock: socket.socket, host: Host) -> float:
    """MB/s that leave the host's interface while so much is sent as can be."""
    data = bytes(2**20)
    for _ in range(4):
        sock.sendall(data)
    before, begun_s = _sent(host), time.monotonic()
    while time.monotonic() < begun_s + _LEAST_S:
        sock.sendall(data)
    return (_sent(host) - before) / (time.monotonic() - begun_s) / 1e6


def _sent(host: Host) -> int:
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == host.interface:
            return int(numbers.split()[8])
    raise LookupError(host.interface)


def _take_all(namespace: str, host: str, port: int) -> None:
    wire.enter(namespace)
    with socket.create_connection((host, port)) as sock:
        _drain(sock)


def _give_all(namespace: str, host: str, port: int) -> None:
    wire.enter(namespace)
    data = bytes(2**20)
    with socket.create_connection((host, port)) as sock, suppress(OSError):
        while True:
            sock.sendall(data)


def _drain(sock: socket.socket) -> None:
    view = memoryview(bytearray(2**20))
    with suppress(OSError):
        while sock.recv_into(view):
            pass


def _push_and_pull(hosts: Sequence[Host], sizes: Sequence[float], rounds: int) -> list[wire.Row]:
    rows: list[wire.Row] = []
    for secure in (False, True):
        most = int(max(sizes) * 1e6)
        there = {"host": hosts[1].address, "namespace": hosts[1].namespace}
        with wire.rivals(secure, most, wire.PIECE_BYTES, **there) as (link, bare):
            rows += [wire.measured(size, secure, link, bare, rounds) for size in sizes]
    return rows


def _wire_lines(rows: Sequence[wire.Row]) -> list[str]:
    lines = [f"{'':14}{'link MB/s':>12}{'bare MB/s':>12}{'link / bare':>14}"]
    for row in rows:
        named = f"{'tls' if row.secure else 'plain'} {row.size_mb:g} MB"
        spread = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        lines.append(f"{named:14}{row.link_mb_s:12,.1f}{row.bare_mb_s:12,.1f}   {spread}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
