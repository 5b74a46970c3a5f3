"""The ways of training that are measured, and the life of one of their processes.

    python -m benchmarks.rivals WAY JOB RANK SOCKET

A process makes its model and its batches, connects to the benchmark's Unix socket, and then sleeps in a read until
it is told to train a slice: JSON objects, one a line. The benchmark says ``{"at", "steps", "seconds"}`` (begin at
that moment of CLOCK_MONOTONIC; so many steps, or for so long if steps is 0) and a worker answers
``{"steps", "seconds"}``. When the benchmark closes the connection, the process ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn, optim

from benchmarks.jobs import Job, Steps, find_job, make_step

_FORGOTTEN_S = 3600.0  # a worker that hears nothing for so long ends by itself
_GLOO_S = 120.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Way:
    """``started`` processes are started by the benchmark: the workers, or who starts them, and a server of rpc's."""

    name: str
    told: str
    kind: Literal["apart", "ddp", "rpc", "ray", "paceline", "elsewhere"]
    workers: int = 2
    servers: int = 0
    fused: bool = False
    keeps: bool = False  # is its allocator told to keep what steps free, as that of paceline's workers is?
    pace: str = "sync"
    bare: bool = False  # without the undo area, so as to measure what it costs
    small_pages: bool = False  # shared memory as the kernel gives it, so as to measure what huge pages bring

    @property
    def together(self) -> bool:
        """Do its workers wait for each other, so that all must take equally many steps?"""
        return self.kind != "apart" and self.pace != "async"

    @property
    def started(self) -> int:
        if self.kind in ("paceline", "ray"):
            return 1
        return self.workers + (1 if self.kind == "rpc" else 0)

    @property
    def answering(self) -> int:
        """Processes that train slices; of Ray's it is the driver, for all."""
        return 1 if self.kind == "ray" else self.workers

    def missing(self) -> str | None:
        """What has to be installed before this way can be measured."""
        return "ray" if self.kind == "ray" and find_spec("ray") is None else None


WAYS = {
    way.name: way
    for way in (
        Way("one", "one process", "apart", workers=1),
        Way("ceiling", "two processes that share nothing", "apart"),
        Way("ceiling_fused", "the same, AdamW(fused=True)", "apart", fused=True),
        Way("ddp", "DistributedDataParallel, gloo", "ddp"),
        Way("ddp_fused", "the same, AdamW(fused=True)", "ddp", fused=True),
        Way("ceiling_best", "two apart, fused, memory kept", "apart", fused=True, keeps=True),
        Way("ddp_best", "DDP, fused, memory kept", "ddp", fused=True, keeps=True),
        Way("rpc", "server on torch.distributed.rpc", "rpc"),
        Way("ray", "Ray's documented server", "ray"),
        Way("sync", "paceline sync", "paceline"),
        Way("sync_server", "paceline sync, 1 server", "paceline", servers=1),
        Way("quorum", "paceline quorum:1", "paceline", pace="quorum:1"),
        Way("bounded", "paceline bounded:4", "paceline", pace="bounded:4"),
        Way("async", "paceline async", "paceline", pace="async"),
        Way("async_server", "paceline async, 1 server", "paceline", servers=1, pace="async"),
        Way("local", "paceline local:16", "paceline", pace="local:16"),
        Way("sync_bare", "paceline sync, no undo area", "paceline", bare=True),
        Way("sync_small", "paceline sync, small pages", "paceline", small_pages=True),
        Way("elsewhere", "paceline sync, started by others", "elsewhere"),
        Way("async_bare", "paceline async, no undo area", "paceline", pace="async", bare=True),
    )
}


def find_way(name: str) -> Way:
    """One of WAYS; ``sync@4`` is it with 4 workers in place of 2."""
    plain, _, workers = name.partition("@")
    return replace(WAYS[plain], name=name, workers=int(workers)) if workers else WAYS[plain]


def main(way: Way, job: Job, rank: int, path: str) -> None:
    # Be killed when the benchmark is: a stopped process would not see the connection close.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(1)
    match way.kind:
        case "apart":
            model, optimizer = _make(way, job)
            _answer(job, model, optimizer, rank, path)
        case "ddp":
            _train_ddp(way, job, rank, path)
        case "rpc":
            _train_rpc(way, job, rank, path)
        case "ray":
            _drive_ray(way, job, path)
        case "paceline":
            _launch_paceline(way, job, path)
        case "elsewhere":
            _train_paceline(rank, way.name, job.name, path)


def _make(way: Way, job: Job) -> tuple[nn.Module, optim.Optimizer]:
    torch.manual_seed(0)
    model = job.model()
    return model, job.optimizer(model, way.fused)


def _train_ddp(way: Way, job: Job, rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    # GLOO_SOCKET_IFNAME comes from the benchmark; the file only tells the ranks each other's address.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}.store",
        rank=rank,
        world_size=way.workers,
        timeout=timedelta(seconds=_GLOO_S),
    )
    model, optimizer = _make(way, job)
    # Sparse gradients are reduced apart from the buckets.
    replica = DistributedDataParallel(model, gradient_as_bucket_view=job.can_fuse, static_graph=job.can_fuse)
    _answer(job, replica, optimizer, rank, path)
    dist.destroy_process_group()


def _train_rpc(way: Way, job: Job, rank: int, path: str) -> None:
    from benchmarks import servers

    model, optimizer = _make(way, job)
    if rank == way.workers:
        servers.serve(model, optimizer, rank, way.workers, path)
        return
    servers.connect(rank, way.workers, path)
    _answer(job, model, servers.ThroughServer(model), rank, path)
    servers.end()


def _drive_ray(way: Way, job: Job, path: str) -> None:
    import ray

    from benchmarks import servers

    step, finish = servers.ray_step(job.name, way.workers)
    size_bytes = sum(p.numel() * p.element_size() for p in job.model().parameters())
    _listen(step, size_bytes, path, finish=finish, workers=way.workers)
    ray.shutdown()


def _launch_paceline(way: Way, job: Job, path: str) -> None:
    import paceline

    paceline.launch(
        _train_paceline,
        (way.name, job.name, path),
        workers=way.workers,
        servers=way.servers,
        pace=way.pace,
        threads=1,
        runs=Path(f"{path}.runs"),
        watch=lambda _: None,
    )


def _train_paceline(rank: int, way: str, job: str, path: str) -> None:
    """What each of paceline's workers runs."""
    import paceline
    from paceline.transport import segment

    if find_way(way).bare:
        _save_nothing()
    if find_way(way).small_pages:
        segment.enlarge = lambda memory, ranges: None
    run = paceline.init()
    model, optimizer = run.wrap(*_make(find_way(way), find_job(job)))
    _answer(find_job(job), model, optimizer, rank, path)


def _save_nothing() -> None:
    from paceline.params.shard import Shard

    step = Shard.step

    def bare(shard: Shard, *args: Any, rate: float = 1.0, **undo: Any) -> None:
        step(shard, *args, rate=rate)

    Shard.step = bare  # type: ignore[method-assign, assignment]


def _answer(job: Job, model: nn.Module, optimizer: Steps, rank: int, path: str) -> None:
    step = make_step(job, model, optimizer, job.batches(seed=rank))
    _listen(step, sum(p.numel() * p.element_size() for p in model.parameters()), path)


def _listen(
    step: Callable[[], None], size_bytes: int, path: str, *, finish: Callable[[], None] | None = None, workers: int = 1
) -> None:
    """Train slices as told until the benchmark closes the connection. ``step`` is one of ``workers``."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_FORGOTTEN_S)
        connection.connect(path)
        with connection.makefile("rw", encoding="utf-8") as lines:
            print(json.dumps({"pid": os.getpid(), "parameter_bytes": size_bytes}), file=lines, flush=True)
            for line in lines:
                steps, took_s = _train_slice(step, finish or (lambda: None), **json.loads(line))
                print(json.dumps({"steps": steps * workers, "seconds": took_s}), file=lines, flush=True)


def _train_slice(
    step: Callable[[], None], finish: Callable[[], None], *, at: float, steps: int, seconds: float
) -> tuple[int, float]:
    """(steps taken, seconds they took), after a tenth as many that nobody counts: in the caches there is at first what
    another way has left."""
    time.sleep(max(at - time.monotonic(), 0.0))
    begun = time.monotonic()
    _take(step, -(-steps // 10), begun + seconds / 10)
    finish()
    begun = time.monotonic()
    done = _take(step, steps, begun + seconds)
    finish()
    return done, time.monotonic() - begun


def _take(step: Callable[[], None], steps: int, until_s: float) -> int:
    """So many steps, or until then if that is 0; how many they were."""
    done = 0
    while done < steps or (steps == 0 and time.monotonic() < until_s):
        step()
        done += 1
    return done


if __name__ == "__main__":
    main(find_way(sys.argv[1]), find_job(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
