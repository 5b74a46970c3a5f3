"""The typed records of a run: the one source of the progress line, the plots and the files of a run.

Engines make them, ``report/`` and the command line only read them. Times are seconds; ``time_s`` is
seconds since the run began. A file of records is JSON, one a line.
"""

from __future__ import annotations

import msgspec


class Process(msgspec.Struct, frozen=True):
    """One process of a run. ``role`` is "front" (the one that the user has started), "launcher", "worker" or
    "server"; of several with one role and rank the last is there."""

    role: str
    rank: int
    pid: int
    host: str


class RunInfo(msgspec.Struct, kw_only=True):
    """run.json: what was started, where, with what; rewritten when processes start and when the run ends.

    ``status`` is "starting", "running", "done", "failed" or "interrupted".
    """

    run: str
    status: str
    argv: list[str]
    seed: int
    pace: str
    workers: int
    servers: int
    engine: str = "local"
    git: str | None = None
    versions: dict[str, str] = {}
    machines: list[dict[str, str | int]] = []
    processes: list[Process] = []
    started: str = ""
    exit_code: int | None = None


class Started(msgspec.Struct, frozen=True, tag="started"):
    """All processes exist and the scripts have begun."""

    directory: str
    processes: list[Process]


class Wrapped(msgspec.Struct, frozen=True, tag="wrapped"):
    """A model and its optimizer are in shared memory."""

    time_s: float
    parameters: int
    size_bytes: int
    optimizer: str


class Epoch(msgspec.Struct, frozen=True, tag="epoch"):
    """A worker 0 pass over a loader begins: ``steps`` is its ``len`` (None if it has none)."""

    time_s: float
    epoch: int
    steps: int | None


class Metric(msgspec.Struct, frozen=True, tag="metric"):
    """One line of metrics.jsonl: one round, merged over the workers that took part.

    ``loss`` is their mean weighted by samples (None if nothing was logged); ``samples`` their sum. The
    three durations are means over those workers: computing (between two steps), waiting (for others) and
    exchanging (copying, folding, stepping). ``staleness`` is the mean over their pushes, in steps; ``dropped`` counts
    pushes that came too late (quorum). At bounded and async a line is as many pushes as there are workers, at local
    a round of several steps. ``values`` holds whatever else was logged, worker 0's.

    What is logged behind an epoch has a line of its own, with the epoch's last step, no samples and no durations.
    """

    step: int
    epoch: int
    time_s: float
    loss: float | None
    samples: int
    computing_s: float
    waiting_s: float
    exchanging_s: float
    bytes_sent: int = 0
    staleness: float = 0.0
    dropped: int = 0
    values: dict[str, float | None] = {}  # None: not a finite number


def is_behind(metric: Metric) -> bool:
    """Is it what was logged behind an epoch, and no round?"""
    return not (metric.samples or metric.computing_s or metric.waiting_s or metric.exchanging_s)


class Output(msgspec.Struct, frozen=True, tag="output"):
    """Text that worker 0's script printed."""

    text: str


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """One line of events.jsonl: something happened that a person may want to know.

    ``kind`` is a word such as "join", "leave", "died", "stop"; ``text`` is the sentence.
    """

    time_s: float
    kind: str
    text: str
    role: str = ""
    rank: int | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag="summary"):
    """summary.json, and the object that ``--json`` prints. ``run`` is the run directory's path.

    ``steps`` counts rounds, pushes of all divided by the number of workers, or local steps; ``staleness`` is the mean
    of a push in steps, ``dropped`` how many pushes came too late (quorum).
    ``seconds`` is the time from the first batch to the last step; ``waiting`` the share of it (0 to 1)
    that workers spent waiting for others; ``loss`` the mean over the last 5 % of the steps, at least one, or if it was
    logged behind epochs only, over so many of these; ``values`` whatever else was logged, each as it was last.
    """

    run: str
    status: str
    pace: str
    workers: int
    servers: int
    steps: int
    samples: int
    seconds: float
    samples_per_s: float
    loss: float | None
    waiting: float
    bytes_sent: int
    epochs: int = 0
    reason: str = ""
    exit_code: int = 0
    staleness: float = 0.0
    dropped: int = 0
    values: dict[str, float | None] = {}


Record = Started | Wrapped | Epoch | Metric | Output | Notice | Summary
