"""Claims about a run on a cluster of Ray whose servers have the driver's node for themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.test_ray import COUNT, FOREVER, node
from tests.engines.test_torchrun import TRAIN
from tests.process import standing
from tests.process.kills import COUNTING
from tests.process.runner import ROOT, Runner
from tests.process.training import TRAINING, numbers

pytest.importorskip("ray", reason="Ray is not installed (make long installs it)")
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

# Without clipping, whose norm is of gradients that have crossed. Each worker leaves word of its node.
TRAINS = TRAIN.replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass").replace(
    "run = paceline.init()",
    "run = paceline.init()\nimport os\nopen(f'node-{run.rank}', 'w').write(os.environ['RAY_RAYLET_PID'])",
)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head with room for all."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=node(4))
        yield made
        made.shutdown()


def options(cluster: Any, *more: str) -> tuple[str, ...]:
    start = ("--engine", "ray", "--ray-address", cluster.address, "--workers", "2", "--servers", "2")
    return (*start, "--servers-apart", *more)


def test_workers_are_on_other_nodes_and_train_to_the_same_bits(runner: Runner, cluster: Any) -> None:
    for _ in range(2):
        cluster.add_node(**node(1))
    runner.write("train.py", TRAINS)
    ended = runner.start_run("train.py", *options(cluster), args=["apart.json"]).end()
    assert ended.code == 0, ended.err
    assert (ended.answer["status"], ended.answer["workers"], ended.answer["steps"]) == ("done", 2, 24)
    (raylet,) = cluster.head_node.all_processes["raylet"]
    on = {(runner.folder / f"node-{rank}").read_text() for rank in range(2)}
    assert len(on) == 2
    assert str(raylet.process.pid) not in on
    runner.write("train.py", TRAIN.replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass"))
    here = runner.start_run("train.py", "--servers", "2", "--run-dir", "local", args=["local.json"]).end()
    assert here.code == 0, here.err
    assert (runner.folder / "apart.json").read_text() == (runner.folder / "local.json").read_text()


@pytest.mark.parametrize("pace", ["sync", "bounded:1"])
def test_a_node_is_lost_and_one_comes_and_a_server_is_killed(runner: Runner, cluster: Any, pace: str) -> None:
    """Each sample counts once; home's node has room, which is not used."""
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    os.mkfifo(runner.folder / "gone")
    nodes = [cluster.add_node(**node(1)) for _ in range(2)]
    running = runner.start_run("count.py", *options(cluster, "--pace", pace, "--return-timeout", "120"))
    with open(runner.folder / "gone", "r+b", buffering=0) as pipe:
        running.until("it trains")
        (run,) = (runner.folder / "runs").iterdir()
        processes = json.loads((run / "run.json").read_text())["processes"]
        os.kill(next(p["pid"] for p in processes if (p["role"], p["rank"]) == ("server", 0)), signal.SIGKILL)
        cluster.remove_node(nodes[0], allow_graceful=False)
        running.until("is lost")
        pipe.write(bytes(9))  # one for each process that comes there, now or later
        cluster.add_node(**node(1))
        ended = running.end()
    assert ended.code == 0, ended.err
    assert json.loads((runner.folder / "counts.json").read_text()) == [3.0] * 64
    assert (ended.answer["status"], ended.answer["workers"], ended.answer["samples"]) == ("done", 2, 3 * 64)
    assert "server 0" in "".join(event.get("text", "") for event in ended.events)


def test_a_node_that_comes_is_used_and_home_s_is_not(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("forever.py", FOREVER)
    cluster.add_node(**node(2))
    running = runner.start_run("forever.py", *options(cluster, "--max-workers", "3", "--pace", "bounded:2"))
    running.until("it trains")
    assert "3 workers" not in running.out + running.err
    cluster.add_node(**node(1))
    running.until("3 workers instead of 2")
    running.until("worker 2 trains with the others")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert (ended.code, ended.summary["status"], ended.summary["workers"]) == (130, "interrupted", 3)


def test_a_run_that_is_resumed_is_apart_again_to_the_bit(runner: Runner, cluster: Any) -> None:
    cluster.add_node(**node(2))
    standing.prepare(runner, [])
    runner.write("train.py", TRAINING)
    more = ("--checkpoint-every", "5", "--keep", "9")
    ended = runner.start_run("train.py", *options(cluster, *more), args=("3", "0")).end()
    expected = numbers(ended)
    (ended.directory / "numbers.json").unlink()
    for late in sorted((ended.directory / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    told = runner.paceline("resume", "--json", ended.directory.name)
    assert "goes on behind step 15" in told.out + told.err
    assert "home alone on this machine" in told.out + told.err
    assert numbers(told) == expected


def test_where_there_is_no_other_node_that_is_said(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("forever.py", FOREVER)
    ended = runner.start_run("forever.py", *options(cluster)).end()
    assert ended.code == 3
    assert "Ray's cluster has no node for workers but this one, where servers are" in ended.error
    assert "ray start --address" in ended.error
    assert not (runner.folder / "runs").exists()
