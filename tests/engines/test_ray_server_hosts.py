"""Claims about a run on a cluster of Ray whose servers have several nodes for themselves."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.test_ray import COUNT, FOREVER, node
from tests.engines.test_ray_servers_apart import TRAINS
from tests.engines.test_torchrun import TRAIN
from tests.process.kills import COUNTING
from tests.process.runner import ROOT, Runner

pytest.importorskip("ray", reason="Ray is not installed (make long installs it)")
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


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


def options(cluster: Any, *more: str, servers: int = 3) -> tuple[str, ...]:
    start = ("--engine", "ray", "--ray-address", cluster.address, "--workers", "2", "--servers", str(servers))
    return (*start, "--servers-apart", "--server-hosts", "2", *more)


def raylet(there: Any) -> str:
    (found,) = there.all_processes["raylet"]
    return str(found.process.pid)


def test_workers_are_on_none_of_the_servers_nodes_and_train_to_the_same_numbers(runner: Runner, cluster: Any) -> None:
    small, *large = [cluster.add_node(**node(count)) for count in (1, 2, 2)]
    runner.write("train.py", TRAINS)
    ended = runner.start_run("train.py", *options(cluster), args=["apart.json"]).end()
    assert ended.code == 0, ended.err
    assert (ended.answer["status"], ended.answer["workers"], ended.answer["steps"]) == ("done", 2, 24)
    on = {(runner.folder / f"node-{rank}").read_text() for rank in range(2)}
    assert on <= {raylet(there) for there in large}
    assert raylet(small) not in on  # where server 1 is
    runner.write("train.py", TRAIN.replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass"))
    here = runner.start_run("train.py", "--servers", "3", "--run-dir", "local", args=["local.json"]).end()
    assert here.code == 0, here.err
    theirs, ours = (json.loads((runner.folder / name).read_text()) for name in ("apart.json", "local.json"))
    assert theirs == ours


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_a_run_whose_server_s_node_is_lost_ends_in_words_and_goes_on(runner: Runner, cluster: Any, pace: str) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    os.mkfifo(runner.folder / "gone")
    small, *_ = [cluster.add_node(**node(count)) for count in (1, 2)]
    more = ("--pace", pace, "--checkpoint-every", "5", "--threads", "1")
    running = runner.start_run("count.py", *options(cluster, *more, servers=2))
    with open(runner.folder / "gone", "r+b", buffering=0) as pipe:
        running.until("it trains")
        cluster.remove_node(small, allow_graceful=False)
        ended = running.end()
        assert (ended.code, ended.summary["status"]) == (5, "failed")
        assert "server 1 is lost" in ended.error
        assert "paceline resume" in ended.error
        pipe.write(bytes(9))
        cluster.add_node(**node(1))
        told = runner.paceline("resume", "--json", ended.directory.name)
    assert told.code == 0, told.err
    assert told.answer["status"] == "done"
    assert json.loads((runner.folder / "counts.json").read_text()) == [3.0] * 64


def test_a_node_that_comes_is_used_for_a_worker(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("forever.py", FOREVER)
    for count in (1, 2):
        cluster.add_node(**node(count))
    more = ("--max-workers", "3", "--pace", "bounded:2")
    running = runner.start_run("forever.py", *options(cluster, *more, servers=2))
    running.until("it trains")
    cluster.add_node(**node(1))
    running.until("3 workers instead of 2")
    running.until("worker 2 trains with the others")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert (ended.code, ended.summary["status"], ended.summary["workers"]) == (130, "interrupted", 3)


def test_where_there_are_too_few_nodes_that_is_said(runner: Runner, cluster: Any) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("forever.py", FOREVER)
    cluster.add_node(**node(2))
    ended = runner.start_run("forever.py", *options(cluster)).end()
    assert ended.code == 3
    assert "--server-hosts is 2, and Ray's cluster has 1 node beside this one, which is not enough" in ended.error
    cluster.add_node(**node(2))
    ended = runner.start_run("forever.py", *options(cluster, servers=6)).end()
    assert ended.code == 3
    assert "servers are to have one for themselves, with 3 CPUs" in ended.error
    assert not (runner.folder / "runs").exists()
