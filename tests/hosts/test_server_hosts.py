"""Claims about a run whose servers are on two hosts, and its workers on two others: that it trains as any, and how it
ends when a host of servers is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.engines.test_torchrun import COUNT, FOREVER
from tests.hosts.namespaces import Host, missing, some_hosts
from tests.hosts.test_servers_apart import MASTER_PORT, TRAINS, both_sides, common, counts, stand_once
from tests.process import standing
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running
from tests.process.training import TRAINING, numbers

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(params=[4])
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, ...]]:
    """Home's, with server 0; server 1's; two for workers."""
    why = missing()
    if why:
        pytest.skip(why)
    with some_hosts(request.param) as made:
        yield made


def start(runner: Runner, hosts: tuple[Host, ...], *arguments: str, **variables: str) -> list[Running]:
    """A process on each host, by rank."""
    return [
        runner.start_in(
            host.inside,
            *arguments,
            WORLD_SIZE=str(len(hosts)),
            LOCAL_WORLD_SIZE="1",
            RANK=str(rank),
            **(common(runner, hosts) | {"PACELINE_SERVER_HOSTS": "2"} | variables),
        )
        for rank, host in enumerate(hosts)
    ]


def test_workers_train_as_one_process_on_the_whole_batch(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("train.py", TRAINS)
    ended = both_sides(start(runner, hosts, "train.py", "apart.json"))
    assert (ended.summary["status"], ended.summary["workers"], ended.summary["steps"]) == ("done", 2, 24)
    assert "2 workers started by torchrun, 2 servers on 2 hosts, home on this machine" in ended.out
    alone = runner.python("train.py", "alone.json")
    assert alone.code == 0, alone.err
    theirs, ours = (json.loads((runner.folder / name).read_text()) for name in ("apart.json", "alone.json"))
    for one, other in zip(theirs, ours, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("pace", ["sync", "bounded:1", "async", "quorum:2"])
def test_each_sample_counts_once(runner: Runner, hosts: tuple[Host, ...], pace: str) -> None:
    """Few parameters are one server's: the last one's, on the other host. A process there has nothing to do."""
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    home, other, *workers = hosts
    ended = both_sides(start(runner, (home, other, other, *workers), "count.py", PACELINE_PACE=pace))
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)


@pytest.mark.long
@pytest.mark.parametrize("pace", ["sync", "async"])
def test_a_run_whose_server_host_is_cut_off_ends_in_words_and_goes_on(
    runner: Runner, hosts: tuple[Host, ...], pace: str
) -> None:
    """Behind step 2 of epoch 1 there is a checkpoint, and a worker that stands still until the host is gone."""
    stand_once(runner)
    options = {"PACELINE_PACE": pace, "PACELINE_CHECKPOINT_EVERY": "5"}
    running = start(runner, hosts, "count.py", **options)
    (lost, *_), home = running[1:], running[0]
    running[2].until("stands at 1.")
    hosts[1].cut()
    runner.kept["place-1"].write(b"!")
    ended = home.end()
    assert (ended.code, ended.summary["status"], ended.summary["exit_code"]) == (5, "failed", 5)
    assert "server 1 is lost" in ended.error
    assert "paceline resume" in ended.error
    assert lost.end().code
    assert all(worker.end().code for worker in running[2:])
    again = (hosts[0], hosts[2], hosts[3], hosts[3])  # which has a server in the place of that host
    resume = {"PACELINE_RESUME": ended.directory.name, "PACELINE_JSON": "1"}
    told = both_sides(start(runner, again, "count.py", **resume))
    assert told.answer["status"] == "done"
    assert counts(told) == [3.0] * 64


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_run_whose_server_is_killed_ends_in_words(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("forever.py", FOREVER)
    home, server, worker = start(runner, hosts, "forever.py")
    worker.until("it trains")
    server.signal(signal.SIGKILL)
    ended = home.end()
    assert (ended.code, ended.summary["status"], ended.summary["exit_code"]) == (5, "failed", 5)
    assert "server 1 is lost" in ended.error
    assert worker.end().code
    assert server.end().code == -signal.SIGKILL


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_control_c_at_home_ends_all(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("forever.py", FOREVER)
    home, server, worker = start(runner, hosts, "forever.py")
    worker.until("it trains")
    home.signal(signal.SIGINT)
    ended, theirs, _ = [one.end() for one in (home, worker, server)]
    assert (ended.code, ended.summary["status"]) == (130, "interrupted")
    assert theirs.code
    assert [event["text"] for event in ended.events if event.get("kind") == "checkpoint"]


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_termination_on_a_servers_host_is_saved(runner: Runner, hosts: tuple[Host, ...]) -> None:
    """As of a host that SLURM takes away."""
    runner.write("forever.py", FOREVER)
    home, server, worker = start(runner, hosts, "forever.py")
    worker.until("it trains")
    server.signal(signal.SIGTERM)
    ended = home.end()
    assert (ended.code, ended.summary["status"]) == (130, "interrupted")
    assert worker.end().code
    server.end()
    assert [event["text"] for event in ended.events if event.get("kind") == "checkpoint"]


@pytest.mark.long
def test_a_run_that_is_resumed_goes_on_to_the_bit(runner: Runner, hosts: tuple[Host, ...]) -> None:
    standing.prepare(runner, [])
    runner.write("train.py", TRAINING)
    arguments = ("train.py", "3", "0")
    ended = both_sides(start(runner, hosts, *arguments, PACELINE_CHECKPOINT_EVERY="5", PACELINE_KEEP="9"))
    expected = numbers(ended)
    (ended.directory / "numbers.json").unlink()
    for late in sorted((ended.directory / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    told = both_sides(start(runner, hosts, *arguments, PACELINE_RESUME=ended.directory.name, PACELINE_JSON="1"))
    assert "goes on behind step 15" in told.err
    assert numbers(told) == expected


def agents(runner: Runner, hosts: tuple[Host, ...], *arguments: str, **variables: str) -> list[Running]:
    """torchrun on each of three hosts: with a process at home, two servers and a process more, and two workers."""
    return [
        runner.start_in(
            host.inside,
            "-m",
            "torch.distributed.run",
            *("--nnodes", "3", "--node-rank", str(node), "--nproc-per-node", str(count)),
            *("--master-addr", hosts[0].address, "--master-port", MASTER_PORT),
            *arguments,
            **(common(runner, hosts) | {"PACELINE_SERVER_HOSTS": "2", "PACELINE_SERVERS": "4"} | variables),
        )
        for node, (host, count) in enumerate(zip(hosts, (1, 3, 2), strict=True))
    ]


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_servers_are_processes_that_torchrun_has_started(runner: Runner, hosts: tuple[Host, ...]) -> None:
    """One that ends at once, as it has nothing to do, is no reason for it to end the others."""
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = both_sides(agents(runner, hosts, "count.py"))
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
@pytest.mark.parametrize("pace", ["sync", "async"])
def test_workers_that_torchrun_starts_again_go_on(runner: Runner, hosts: tuple[Host, ...], pace: str) -> None:
    """One dies, and torchrun starts both of that host again."""
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = both_sides(agents(runner, hosts, "--max-restarts", "1", "count.py", "die", PACELINE_PACE=pace))
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)
    assert "worker 1 is lost" in ended.out


@pytest.mark.long
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_where_torchrun_starts_processes_again_the_run_goes_on_by_itself(
    runner: Runner, hosts: tuple[Host, ...]
) -> None:
    """A server is killed: the run ends, and the next one begins at its checkpoint, with another in that place."""
    stand_once(runner)
    says = "open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\nrun = paceline.init()"
    script = (runner.folder / "count.py").read_text()
    runner.write("count.py", script.replace("run = paceline.init()", says))
    options = {"PACELINE_RESUME": "last", "PACELINE_CHECKPOINT_EVERY": "5"}
    running = agents(runner, hosts, "--max-restarts", "1", "count.py", **options)
    running[2].until("stands at 1.")
    os.kill(int((runner.folder / "pid2").read_text()), signal.SIGKILL)
    runner.kept["place-1"].write(b"!")
    ended = both_sides(running)
    assert "server 3 is lost" in ended.err
    assert "goes on behind step 5" in ended.out
    assert counts(ended) == [3.0] * 64
    assert ended.summary["status"] == "done"


@pytest.mark.long
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_where_nobody_is_left_to_train_all_are_told(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("forever.py", FOREVER)
    first, second = start(runner, hosts, "forever.py")
    theirs, ended = second.end(), first.end()
    assert (ended.code, theirs.code) == (1, 1)
    assert "server-hosts is 2, and all 2 processes are on 2 hosts: none is left to train on" in ended.err
    assert "home, beside rank 0, has not started" in theirs.err
