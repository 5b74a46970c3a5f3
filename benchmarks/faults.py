"""How long until a fault is seen, and until training goes on; and whether faults leave anything behind.

    python -m benchmarks.faults                                   # times, of 30 faults of each kind
    python -m benchmarks.faults --ways bounded:4 --faults kill --count 100 --json
    python -m benchmarks.faults --memory 600                      # one job, a fault every 5 s, for 10 minutes

One job runs on, and a process of it is killed (SIGKILL) or stopped (SIGSTOP) again and again, from outside. All clocks
are the host's monotonic one. A worker's fault is *seen* when the launcher has told of its death on the board, which is
read here every millisecond; a server's when the launcher has written of it, a launcher's when the next one has. The
other workers train *again* when each has come to a step since the fault that it cannot have made without knowing: the
second at ``sync``, since the first may have been all but done, and ``s`` more at ``bounded:s``. A *new* one is there at
its process's first step. Steps are told by the script itself, which writes down the time behind every
``optimizer.step()``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from paceline.transport import segment
from paceline.transport.board import Board

WAYS = {
    "sync": ["--pace", "sync"],
    "bounded:4": ["--pace", "bounded:4"],
    "sync,servers": ["--pace", "sync", "--servers", "2"],
    "bounded:4,servers": ["--pace", "bounded:4", "--servers", "2"],
}
FAULTS = ("kill", "stop", "server", "launcher")
_AHEAD = {"sync": 0, "bounded:4": 4}  # steps that a worker may make without another
_STEP = struct.Struct("=d")
_PATIENCE_S = 60.0
_LOOK_S = 0.001

# A small model, whose step is short beside what is measured, and data for longer than that.
_SCRIPT = """
import os, struct, time
import torch, paceline


class Batches(torch.utils.data.Dataset):
    images, labels = torch.randn(512, 256), torch.randint(10, (512,))

    def __len__(self):
        return 2_000_000

    def __getitem__(self, number):
        place = number * 8 % 448
        return self.images[place : place + 64], self.labels[place : place + 64]


run = paceline.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
model, optimizer, loader = run.wrap(model, optimizer, loader)
told = os.open(f"steps/{run.rank}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for images, labels in loader:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    os.write(told, struct.pack("=d", time.monotonic()))
    run.log(loss=loss)
"""


class Run:
    """A job of so many workers that trains until it is killed, in a folder of its own."""

    def __init__(self, options: Sequence[str], workers: int, folder: Path) -> None:
        (folder / "steps").mkdir()
        (folder / "train.py").write_text(_SCRIPT)
        self.workers, self._steps = workers, folder / "steps"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        command = [sys.executable, "-m", "paceline", "run", "--json", "--workers", str(workers), *options]
        self._process = subprocess.Popen(
            [*command, "--restarts", "1000000", "train.py"],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._until(lambda: any((folder / "runs").glob("*/run.json")), "a run directory")
        self.directory = next((folder / "runs").iterdir())
        self._until(lambda: all(self.pid("worker", w) and self.steps_of(w) for w in range(workers)), "a first step")
        self.front = self.pid("front", 0)
        self._events = (self.directory / "events.jsonl").open("rb")
        links = Path(f"/proc/{self.front}/fd").iterdir()
        descriptor = os.open(next(path for path in links if "paceline-the board" in os.readlink(path)), os.O_RDWR)
        self.board = Board(segment.attach(descriptor))
        os.close(descriptor)

    def pid(self, role: str, rank: int) -> int:
        """That of the process which has this place now; 0 if there is none yet."""
        processes = json.loads((self.directory / "run.json").read_text())["processes"]
        return next((p["pid"] for p in reversed(processes) if (p["role"], p["rank"]) == (role, rank)), 0)

    def zygote(self) -> int:
        children = Path(f"/proc/{self.front}/task/{self.front}/children").read_text()
        return int(children.split()[0])

    def steps_of(self, rank: int, but: int = 0) -> list[float]:
        """When the steps of a worker's newest process ended; but not those of process ``but``."""
        files = [path for path in self._steps.glob(f"{rank}-*") if path.name != f"{rank}-{but}"]
        newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
        if newest is None:
            return []
        data = newest.read_bytes()
        return [time_s for (time_s,) in _STEP.iter_unpack(data[: len(data) // _STEP.size * _STEP.size])]

    def fault(self, kind: str, rank: int, ahead: int) -> dict[str, float]:
        """Do this to a worker or a server; seconds until it was seen, the others trained again, a new one did."""
        role, number = (kind if kind in ("server", "launcher") else "worker"), _SIGNALS[kind]
        pid, deaths = self.pid(role, rank), self.board.deaths[rank] if role == "worker" else 0
        told: Callable[[], bool] = lambda: self.board.deaths[rank] > deaths  # noqa: E731
        if role != "worker":
            self._events.seek(0, os.SEEK_END)
            told = lambda: f"(pid {pid})".encode() in self._events.read()  # noqa: E731
        others = [worker for worker in range(self.workers) if role != "worker" or worker != rank]
        begun_s = time.monotonic()
        os.kill(pid, number)
        found = {"seen": self._until(told, "a word of the death") - begun_s}

        def again() -> float:
            since = [[step for step in self.steps_of(w) if step > begun_s] for w in others]
            return max(steps[1 + ahead] for steps in since) if min(map(len, since)) > 1 + ahead else 0.0

        self._until(lambda: again() > 0, "steps of the others", 0.05)
        found["again"] = again() - begun_s
        if role == "worker":
            self._until(lambda: len(self.steps_of(rank, but=pid)) > 1, "steps of the new one", 0.05)
            found["new"] = self.steps_of(rank, but=pid)[0] - begun_s
            (self._steps / f"{rank}-{pid}").unlink()
        self._until(lambda: self.pid(role, rank) not in (0, pid), "its process")
        return found

    def _until(self, true: Callable[[], Any], what: str, every_s: float = _LOOK_S) -> float:
        """Wait for it; when it was seen."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not true():
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                raise RuntimeError(f"the run has ended before {what}: {self._process.stderr.read().decode()}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no sign of {what} in {_PATIENCE_S:g} s")
            time.sleep(every_s)
        return time.monotonic()

    def close(self) -> None:
        """End it now, as two Ctrl-C do."""
        for _ in range(2):
            self._process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        self._process.communicate(timeout=_PATIENCE_S)
        self._events.close()


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "server": signal.SIGKILL, "launcher": signal.SIGKILL}


def times(way: str, kinds: Sequence[str], count: int, workers: int) -> dict[str, dict[str, list[float]]]:
    """Seconds, by fault and by what happened then."""
    luck = random.Random(way)
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds if kind != "server" or "servers" in way}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run = Run(WAYS[way], workers, Path(folder))
        try:
            for number in range(count):
                for kind, columns in found.items():
                    time.sleep(0.5 + luck.random())
                    rank = number % {"server": 2, "launcher": 1}.get(kind, workers)
                    for what, seconds in run.fault(kind, rank, _AHEAD[way.partition(",")[0]]).items():
                        columns.setdefault(what, []).append(seconds)
        finally:
            run.close()
    return found


def memory(way: str, seconds: float, every_s: float, workers: int) -> list[dict[str, Any]]:
    """What front, launcher, zygote and the worker that is spared have, looked at before every fault."""
    looks: list[dict[str, Any]] = []
    kinds = ["kill", "stop"] + (["server"] if "servers" in way else [])
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run = Run(WAYS[way], workers, Path(folder))
        try:
            spared = workers - 1
            pids = {
                "front": run.front,
                "launcher": run.pid("launcher", 0),
                "zygote": run.zygote(),
                f"worker {spared}": run.pid("worker", spared),
            }
            begun_s = time.monotonic()
            while (now_s := time.monotonic() - begun_s) < seconds:
                looks.append({"time_s": now_s, **{name: _look(pid) for name, pid in pids.items()}})
                kind = kinds[len(looks) % len(kinds)]
                run.fault(kind, len(looks) // 2 % (2 if kind == "server" else spared), _AHEAD[way.partition(",")[0]])
                time.sleep(max(0.0, every_s * len(looks) - (time.monotonic() - begun_s)))
        finally:
            run.close()
    return looks


def _look(pid: int) -> dict[str, float]:
    """Megabytes, and a number."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.partition(":")[0]: int(line.split()[1]) / 1e3 for line in lines}
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "private": sizes["Private_Dirty"], "fds": descriptors}


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", default="sync bounded:4 sync,servers", help=f"of: {' '.join(WAYS)}")
    parser.add_argument("--faults", default=" ".join(FAULTS), help=f"of: {' '.join(FAULTS)}")
    parser.add_argument("--count", type=int, default=30, help="faults of each kind (default 30)")
    parser.add_argument("--workers", type=int, default=2, help="(default 2)")
    parser.add_argument("--memory", type=float, metavar="SECONDS", help="look at memory and descriptors for so long")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults with --memory (default 5)")
    parser.add_argument("--json", action="store_true", help="print all times, or looks, as an object")
    options = parser.parse_args(argv)
    answer: dict[str, Any] = {}
    for way in options.ways.split():
        if options.memory is not None:
            answer[way] = looks = memory(way, options.memory, options.every, options.workers)
            if not options.json:
                _print_looks(way, looks)
        else:
            answer[way] = found = times(way, options.faults.split(), options.count, options.workers)
            if not options.json:
                _print_times(way, found)
    if options.json:
        print(json.dumps(answer))
    return 0


def _print_times(way: str, found: dict[str, dict[str, list[float]]]) -> None:
    for kind, columns in found.items():
        cells = [f"{what} {median(values):.3f} (p99 {_quantile(values, 0.99):.3f})" for what, values in columns.items()]
        print(f"{way:20}{kind:8}{len(columns['seen']):4} faults, s: {', '.join(cells)}", flush=True)


def _print_looks(way: str, looks: list[dict[str, Any]]) -> None:
    print(f"{way}: {len(looks)} faults; at the start, median, at the end", flush=True)
    for name in looks[0].keys() - {"time_s"}:
        cells = []
        for what in ("rss", "pss", "private", "fds"):
            values = [look[name][what] for look in looks]
            cells.append(f"{what} {values[0]:.1f} {median(values):.1f} {values[-1]:.1f}")
        print(f"  {name:12}{', '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
