"""What a run is asked to do: the pace, and the frozen ``Job`` that every process agrees on.

A ``Job`` checks itself once, all fields together, when it is made; nothing later re-reads flags.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

from paceline.errors import UsageError

MAX_WORKERS = 256  # the board in shared memory has this many columns at most
MAX_SERVERS = 64
MAX_COMPENSATION = 1e38  # torch refuses to multiply a gradient by what its type cannot hold
_MAX = 2**53

ASSIGNMENTS = ("round_robin", "hash", "random", "block", "lease")
DATA = ("shared", "own", "served")
ENGINES = ("local", "ray", "torchrun")
OUTERS = {"average": (1.0, 0.0), "nesterov": (0.7, 0.9)}  # learning rate and momentum; the second is DiLoCo's
COMPENSATION = 0.04  # lambda of Zheng et al. 2017


@dataclass(frozen=True)
class Sync:
    """Lockstep: a round closes when every worker with data has pushed; the mean is weighted by samples."""

    def __str__(self) -> str:
        return "sync"


@dataclass(frozen=True)
class Quorum:
    """A round closes with its first ``count`` pushes; late ones are dropped, and their samples come again."""

    count: int

    def __post_init__(self) -> None:
        _within("quorum", self.count, 1, MAX_WORKERS)

    def __str__(self) -> str:
        return f"quorum:{self.count}"


@dataclass(frozen=True)
class Bounded:
    """Each push is applied as it comes; a worker begins a step at most ``staleness`` steps ahead of the slowest."""

    staleness: int = 3

    def __post_init__(self) -> None:
        _within("staleness", self.staleness, 0, _MAX)

    def __str__(self) -> str:
        return f"bounded:{self.staleness}"


@dataclass(frozen=True)
class Async:
    """Each push is applied as it comes, and nobody waits. With ``every`` above 1 a worker takes so many steps on its
    own copy, then pushes their summed gradients (Downpour)."""

    every: int = 1

    def __post_init__(self) -> None:
        _within("every", self.every, 1, _MAX)

    def __str__(self) -> str:
        return "async" if self.every == 1 else f"async:{self.every}"


@dataclass(frozen=True)
class Local:
    """``every`` steps on one's own copy with one's own optimizer, then a round: an outer SGD steps the shared
    parameters with the mean of (shared - own). lr 1 and momentum 0 average; lr 0.7 and momentum 0.9 (Nesterov) is
    DiLoCo."""

    every: int = 32
    outer_lr: float = 1.0
    outer_momentum: float = 0.0

    def __post_init__(self) -> None:
        _within("every", self.every, 1, _MAX)
        for name, high in (("outer_lr", math.inf), ("outer_momentum", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < high:
                allowed = "0 or more and below 1" if high == 1.0 else "a number, 0 or more"
                raise UsageError(f"{name} is {value!r}; it must be {allowed}")
            object.__setattr__(self, name, float(value))

    def __str__(self) -> str:
        outer = (self.outer_lr, self.outer_momentum)
        named = {value: f":{name}" for name, value in OUTERS.items()} | {OUTERS["average"]: ""}
        return f"local:{self.every}" + named.get(outer, f":{outer[0]!r}:{outer[1]!r}")


Pace = Sync | Quorum | Bounded | Async | Local
PACES = ("sync", "quorum:K", "bounded:S", "async", "async:H", "local:H", "local:H:nesterov", "local:H:LR:MOMENTUM")
_WORDS = ("sync", "quorum", "bounded", "async", "local")


def parse_pace(text: str) -> Pace:
    """``"bounded:4"`` -> ``Bounded(4)``. Raises UsageError that lists the paces there are."""
    word, *numbers = text.strip().lower().split(":")
    match word, numbers:
        case "sync", []:
            return Sync()
        case "quorum", [count]:
            return Quorum(_whole(text, count))
        case "bounded", []:
            return Bounded()
        case "bounded", [staleness]:
            return Bounded(_whole(text, staleness))
        case "async", []:
            return Async()
        case "async", [every]:
            return Async(_whole(text, every))
        case "local", []:
            return Local()
        case "local", [every]:
            return Local(_whole(text, every))
        case "local", [every, outer] if outer in OUTERS:
            return Local(_whole(text, every), *OUTERS[outer])
        case "local", [every, lr, momentum]:
            return Local(_whole(text, every), _number(text, lr), _number(text, momentum))
    fix = _nearest(word, _WORDS)
    if word == "quorum":
        fix = "say how many pushes close a round: quorum:3"
    raise UsageError(f"pace {text!r} is not known; it must be one of: {', '.join(PACES)}", fix=fix)


def _whole(pace: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"pace {pace!r} has {text!r} where a whole number belongs; for example bounded:4, local:32")
    return int(text)


def _number(pace: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"pace {pace!r} has {text!r} where a number belongs; for example local:32:0.7:0.9") from None


@dataclass(frozen=True)
class Job:
    """One run, fully resolved.

    ``workers`` and ``servers`` are counts of processes at the start; with 0 servers the workers divide the
    parameters among themselves. ``max_workers`` and ``max_servers`` are how many there may ever be (``paceline scale``;
    None: see ``places`` and ``server_places``). ``assign`` says how samples are dealt out (None: ``lease`` at paces
    ``bounded`` and ``async``, else ``round_robin``), ``data`` where they are: all on every worker (``shared``), each
    worker's own part with itself (``own``), all with worker 0, who sends the batches (``served``).
    ``staleness_damping`` divides the learning rate by max(1, staleness) (Zhang et al. 2016), ``compensate`` is the
    lambda of delay compensation (Zheng et al. 2017), of dense gradients only; both for ``bounded`` and ``async``.
    ``clip`` is the largest norm of a gradient, of all workers' at round paces, else of a push.
    ``restarts`` is how often a worker that dies is replaced without having got on in between; then the run ends, or
    goes on without it while ``min_workers`` are left (None: all).
    ``hang_timeout`` is in seconds: so long a worker may use no processor, or not finish a step, while others
    wait for it; see ``engine/launcher/watch.py``.
    ``engine`` is who starts the workers: this machine's launcher, Ray (at ``ray_address``; None: where Ray finds a
    cluster), or torchrun. Where it is not the launcher, workers elsewhere come over links: to the address of
    ``interface`` (a name, an address or a network; None: the one that the others know), from ``port`` on, one a worker
    (0: any that are free), by TLS unless ``insecure``. ``return_timeout`` is how many seconds a worker elsewhere that
    was lost may take to come again. ``servers_apart``: no worker is on the host that home and the servers are on;
    ``server_hosts``: the servers are in turn on so many hosts (``servers_on``), of which home's is the first.
    ``checkpoint_every`` is in steps (None: only at Ctrl-C); the ``keep`` newest checkpoints stay.
    ``threads`` is per process (None: cores // workers, at least 1).
    ``steps`` counts rounds, or pushes of all workers divided by their number at the start, so that every pace sees as
    many samples;
    ``epochs`` passes over the training loader; ``until_loss`` and
    ``patience`` stop at convergence. ``runs`` is the folder in which run directories are made.
    """

    name: str
    workers: int = 2
    servers: int = 0
    max_workers: int | None = None
    max_servers: int | None = None
    pace: Pace = field(default_factory=Sync)
    assign: str | None = None
    data: str = "shared"
    engine: str = "local"
    ray_address: str | None = None
    interface: str | None = None
    port: int = 0
    insecure: bool = False
    servers_apart: bool = False
    server_hosts: int = 1
    return_timeout: float = 60.0
    staleness_damping: bool = False
    compensate: float | None = None
    clip: float | None = None
    restarts: int = 3
    min_workers: int | None = None
    hang_timeout: float = 30.0
    checkpoint_every: int | None = None
    keep: int = 2
    threads: int | None = None
    seed: int = 0
    steps: int | None = None
    epochs: int | None = None
    until_loss: float | None = None
    patience: int | None = None
    runs: Path = Path("runs")

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", Path(self.runs))
        _within("workers", self.workers, 1, MAX_WORKERS)
        _within("servers", self.servers, 0, MAX_SERVERS)
        if self.max_workers is not None:
            _within("max-workers", self.max_workers, self.workers, MAX_WORKERS)
        if self.max_servers is not None:
            if not self.servers:
                raise UsageError("max-servers is for runs with servers; a run without any stays so", fix="--servers 1")
            _within("max-servers", self.max_servers, self.servers, MAX_SERVERS)
        _within("restarts", self.restarts, 0, _MAX)
        _within("keep", self.keep, 1, _MAX)
        if self.min_workers is not None:
            _within("min-workers", self.min_workers, 1, self.workers)
        for name in ("checkpoint_every", "threads", "steps", "epochs", "patience"):
            value = getattr(self, name)
            if value is not None:
                _within(name, value, 1, _MAX)
        _within("seed", self.seed, 0, 2**63 - 1)
        if self.until_loss is not None and self.until_loss != self.until_loss:
            raise UsageError("until-loss is nan; it must be a number")
        self._check_pace()
        self._check_data()
        self._check_engine()

    @property
    def places(self) -> int:
        """How many workers there may ever be: places are cheap, so some are kept free."""
        if self.max_workers is not None:
            return self.max_workers
        return self.workers if self.data == "served" else min(max(2 * self.workers, 8), MAX_WORKERS)

    def threads_at_home(self, cores: int, workers: int) -> int:
        """Of each process there, which shares so many cores; there are so many ``workers`` by now."""
        return self.threads or max(1, cores // (len(self.servers_on(0)) if self.servers_apart else workers))

    @property
    def server_places(self) -> int:
        """How many servers there may ever be."""
        if self.server_hosts > 1:
            return self.servers
        return self.max_servers if self.max_servers is not None else min(2 * self.servers, MAX_SERVERS)

    def servers_on(self, host: int) -> range:
        """The servers of one of their hosts; 0 is home's."""
        return range(host, self.servers, self.server_hosts)

    @property
    def servers_elsewhere(self) -> list[int]:
        """Those that are not on home's host."""
        return [server for server in range(self.servers) if server not in self.servers_on(0)]

    def _check_pace(self) -> None:
        pace = self.pace
        if isinstance(pace, Quorum) and pace.count > self.workers:
            raise UsageError(
                f"pace {pace} waits for {pace.count} pushes a round; there are {self.workers} workers",
                fix=f"--pace quorum:{self.workers} at most",
            )
        on_arrival = isinstance(pace, Bounded | Async)
        if self.staleness_damping and not on_arrival:
            raise UsageError(f"staleness-damping is for paces bounded and async; the pace is {pace}")
        if self.clip is not None:
            number = isinstance(self.clip, int | float) and not isinstance(self.clip, bool)
            if not number or not 0 < self.clip < math.inf:
                raise UsageError(f"clip is {self.clip!r}; it must be a number above 0")
        _seconds("hang-timeout", self.hang_timeout)
        if self.compensate is not None:
            number = isinstance(self.compensate, int | float) and not isinstance(self.compensate, bool)
            if not number or not 0 <= self.compensate <= MAX_COMPENSATION:
                raise UsageError(
                    f"compensate is {self.compensate!r}; it must be a number from 0 to {MAX_COMPENSATION:g}"
                )
            if not on_arrival:
                raise UsageError(f"compensate is for paces bounded and async; the pace is {pace}")

    def _check_data(self) -> None:
        _among("data", self.data, DATA)
        if self.data == "own" and self.assign not in (None, "round_robin"):
            raise UsageError(
                f"assign is {self.assign} and data is own; where each worker has its own part, nothing is dealt out",
                fix="leave --assign out, or use --data shared",
            )
        if self.assign is None:
            lease = isinstance(self.pace, Bounded | Async) and self.data != "own"
            object.__setattr__(self, "assign", "lease" if lease else "round_robin")
        assert self.assign is not None
        _among("assign", self.assign, ASSIGNMENTS)

    def _check_engine(self) -> None:
        _among("engine", self.engine, ENGINES)
        _within("port", self.port, 0, 2**16 - 1)
        _seconds("return-timeout", self.return_timeout)
        if self.servers_apart and not self.servers:
            raise UsageError("servers-apart is set, and there are no servers", fix="--servers 1 (PACELINE_SERVERS)")
        if self.servers_apart and self.engine == "local":
            raise UsageError(
                "servers-apart is for runs on several hosts; all of this one is on this machine",
                fix="--engine ray, or torchrun on several hosts; or PACELINE_SERVERS_APART=0",
            )
        _within("server-hosts", self.server_hosts, 1, MAX_SERVERS)
        if self.server_hosts > 1:
            self._check_server_hosts()
        if self.engine == "local":
            return
        if self.data == "served":
            raise UsageError(
                f"data is served, and workers are started by {self.engine}: batches are not sent to other hosts yet",
                fix="shared, with the data on every host; or own, with each worker's part with itself",
            )

    def _check_server_hosts(self) -> None:
        hosts, pace = self.server_hosts, self.pace
        if not self.servers_apart:
            raise UsageError(
                f"server-hosts is {hosts}, and servers-apart is not set: no worker is on a host of the servers then",
                fix="--servers-apart (PACELINE_SERVERS_APART=1), or --server-hosts 1",
            )
        if hosts > self.servers:
            there = "is 1 server" if self.servers == 1 else f"are {self.servers} servers"
            raise UsageError(
                f"server-hosts is {hosts}, and there {there}: each host has one at least",
                fix=f"--servers {hosts} or more, or --server-hosts {self.servers} at most",
            )
        if self.max_servers is not None and self.max_servers > self.servers:
            raise UsageError(
                f"max-servers is {self.max_servers}, and servers are on {hosts} hosts, where none are added to a run",
                fix=f"--servers {self.max_servers}, from the start; or --server-hosts 1",
            )
        if isinstance(pace, Local) or (isinstance(pace, Async) and pace.every > 1):
            raise UsageError(
                f"pace {pace} brings all parameters home, and servers are on {hosts} hosts",
                fix="--pace sync, quorum:K, bounded:S or async; or --server-hosts 1",
            )


def _seconds(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{name} is {value!r}; it must be a number of seconds above 0")


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}; it must be one of: {', '.join(known)}", fix=_nearest(value, known))


def _within(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be a whole number")
    if not low <= value <= high:
        limit = f"{low} or more" if value < low else f"{high} or less"
        raise UsageError(f"{name} is {value}; it must be {limit}")


def _nearest(text: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(text.strip().lower(), known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
