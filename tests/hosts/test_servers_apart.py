"""Claims about a run whose servers have a host of their own: no worker is on it, and nothing else is different."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from paceline.transport.keys import new_job_key
from tests.engines.test_torchrun import COUNT, FOREVER, TRAIN
from tests.hosts.namespaces import Host, missing, some_hosts
from tests.process import standing
from tests.process.kills import COUNTING
from tests.process.runner import Ended, Runner, Running
from tests.process.training import TRAINING, numbers

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]
MASTER_PORT = "29517"

# Without clipping, whose norm is of gradients that have crossed.
TRAINS = TRAIN.replace("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass")


@pytest.fixture(params=[3])
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, ...]]:
    why = missing()
    if why:
        pytest.skip(why)
    with some_hosts(request.param) as made:
        yield made


def start(runner: Runner, hosts: tuple[Host, ...], *arguments: str, **variables: str) -> list[Running]:
    """A process on each host, by rank; on the first home and two servers."""
    return [start_one(runner, hosts, rank, *arguments, **variables) for rank in range(len(hosts))]


def start_one(runner: Runner, hosts: tuple[Host, ...], rank: int, *arguments: str, **variables: str) -> Running:
    place = {"WORLD_SIZE": str(len(hosts)), "LOCAL_WORLD_SIZE": "1", "RANK": str(rank)}
    return runner.start_in(hosts[rank].inside, *arguments, **place, **(common(runner, hosts) | variables))


def agents(runner: Runner, hosts: tuple[Host, ...], *arguments: str, **variables: str) -> list[Running]:
    """torchrun on each of two hosts, with a process on the first and two on the other."""
    return [agent(runner, hosts, node, hosts[node], *arguments, **variables) for node in range(2)]


def agent(runner: Runner, hosts: tuple[Host, ...], node: int, host: Host, *arguments: str, **variables: str) -> Running:
    return runner.start_in(
        host.inside,
        "-m",
        "torch.distributed.run",
        *("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(1 + node)),
        *("--master-addr", hosts[0].address, "--master-port", MASTER_PORT),
        *arguments,
        **(common(runner, hosts) | variables),
    )


def common(runner: Runner, hosts: tuple[Host, ...]) -> dict[str, str]:
    if not (runner.folder / "job.key").exists():
        new_job_key(runner.folder / "job.key")
    there = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": MASTER_PORT, "PACELINE_JOB_KEY_FILE": "job.key"}
    return there | {"PACELINE_SERVERS": "2", "PACELINE_SERVERS_APART": "1"}


def counts(ended: Ended) -> list[float]:
    return list(json.loads((ended.folder / "counts.json").read_text()))


def stand_once(runner: Runner) -> None:
    """A script that counts; worker 0 stands still in epoch 1, until place 1 is written to."""
    stands = "run.is_main and (epoch, steps) == (1, 1) and stand(1)"
    standing.prepare(runner, [1])
    runner.write("counting.py", COUNTING)
    script = COUNT.replace("mark(counts", f"{stands}\n        mark(counts")
    runner.write("count.py", f"from standing import stand\n{script}")


def both_sides(running: list[Running]) -> Ended:
    """How home ended; nobody else has ended otherwise."""
    others, home = [one.end() for one in running[1:]], running[0].end()
    assert [home.code, *(other.code for other in others)] == [0] * len(running), home.err + others[0].err
    return home


def test_workers_apart_from_servers_train_to_the_same_bits(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("train.py", TRAINS)
    ended = both_sides(start(runner, hosts, "train.py", "apart.json"))
    assert (ended.summary["status"], ended.summary["workers"], ended.summary["steps"]) == ("done", 2, 24)
    assert "2 workers started by torchrun, 2 servers and home alone on this machine" in ended.out
    here = runner.start_run("train.py", "--servers", "2", "--run-dir", "local", args=["local.json"]).end()
    assert here.code == 0, here.err
    assert (runner.folder / "apart.json").read_text() == (runner.folder / "local.json").read_text()


@pytest.mark.parametrize("pace", ["bounded:1", "async", "quorum:1", "local:4"])
def test_each_sample_counts_once(runner: Runner, hosts: tuple[Host, ...], pace: str) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = both_sides(start(runner, hosts, "count.py", PACELINE_PACE=pace))
    if pace != "local:4":  # whose workers count together in one step
        assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)


@pytest.mark.parametrize("pace", ["sync", "bounded:1"])
def test_a_killed_worker_and_a_killed_server_cost_no_sample(runner: Runner, hosts: tuple[Host, ...], pace: str) -> None:
    """The worker's process is started again by hand, on its host."""
    stand_once(runner)
    home, first, second = start(runner, hosts, "count.py", "die", PACELINE_PACE=pace)
    first.until("stands at 1.")
    (run,) = (runner.folder / "runs").iterdir()
    processes = json.loads((run / "run.json").read_text())["processes"]
    os.kill(next(p["pid"] for p in processes if (p["role"], p["rank"]) == ("server", 1)), signal.SIGKILL)
    home.until("server 1")
    runner.kept["place-1"].write(b"!")
    assert second.end().code == -signal.SIGKILL
    again = start_one(runner, hosts, 2, "count.py", "die", PACELINE_PACE=pace)
    ended = both_sides([home, first, again])
    assert counts(ended) == [3.0] * 64
    assert "worker 1 is lost" in ended.out


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_host_whose_torchrun_starts_its_workers_again_goes_on(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    ended = both_sides(agents(runner, hosts, "--max-restarts", "1", "count.py", "die"))
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)
    assert "worker 1 is lost" in ended.out


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_servers_host_whose_torchrun_starts_its_process_again_goes_on(
    runner: Runner, hosts: tuple[Host, ...]
) -> None:
    stand_once(runner)
    script = (runner.folder / "count.py").read_text()
    says = "print('rank', *(os.environ[name] for name in ('RANK', 'TORCHELASTIC_RESTART_COUNT')), flush=True)"
    says += "; open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))"
    runner.write("count.py", script.replace("run = paceline.init()", f"{says}\nrun = paceline.init()"))
    running = agents(runner, hosts, "--max-restarts", "1", "count.py")
    running[1].until("stands at 1.")
    os.kill(int((runner.folder / "pid0").read_text()), signal.SIGKILL)
    running[0].until("rank 0 1")  # who finds home, or its run's end
    runner.kept["place-1"].write(b"!")
    ended = both_sides(running)
    assert counts(ended) == [3.0] * 64


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_another_host_takes_the_place_of_one_that_is_lost(runner: Runner, hosts: tuple[Host, ...], pace: str) -> None:
    """All workers are on it: home keeps parameters, optimizer and places."""
    stand_once(runner)
    options = {"PACELINE_PACE": pace}
    first, lost = agents(runner, hosts, "--max-restarts", "1", "count.py", **options)
    lost.until("stands at 1.")
    hosts[1].cut()
    first.until("is lost")
    lost.close()
    runner.kept["place-1"].write(b"!")
    again = agent(runner, hosts, 1, hosts[2], "--max-restarts", "1", "count.py", **options)
    ended = both_sides([first, again])
    assert counts(ended) == [3.0] * 64
    assert (ended.summary["status"], ended.summary["samples"]) == ("done", 3 * 64)


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_termination_on_the_servers_host_is_saved(runner: Runner, hosts: tuple[Host, ...]) -> None:
    """As of a host that SLURM takes away."""
    stand_once(runner)
    running = agents(runner, hosts, "count.py")
    running[1].until("stands at 1.")
    (run,) = (runner.folder / "runs").iterdir()
    with runner.follow(run / "events.jsonl") as events:
        running[0].signal(signal.SIGTERM)
        events.until("asked to stop: ")
    runner.kept["place-1"].write(b"!")
    theirs, ended = running[1].end(), running[0].end()
    assert ended.code
    assert theirs.code
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("interrupted", 130)
    assert [event["text"] for event in ended.events if event.get("kind") == "checkpoint"]


def test_control_c_on_the_servers_host_ends_all(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("forever.py", FOREVER)
    home, *others = start(runner, hosts, "forever.py")
    others[0].until("it trains")
    home.signal(signal.SIGINT)
    ended, *theirs = [one.end() for one in (home, *others)]
    assert (ended.code, ended.summary["status"]) == (130, "interrupted")
    assert all(other.code for other in theirs)


def test_what_a_worker_raises_is_the_exit_code_there_too(runner: Runner, hosts: tuple[Host, ...]) -> None:
    runner.write("fails.py", FOREVER.replace('print("it trains"', 'raise ValueError("no more")  #'))
    home, beside, *others = start(runner, (hosts[0], *hosts), "fails.py")
    ended, waited, *theirs = [one.end() for one in (home, beside, *others)]
    assert (ended.code, ended.summary["status"]) == (ended.summary["exit_code"], "failed")
    assert (waited.code, waited.out, ended.summary["workers"]) == (ended.code, "", 2)
    assert "ValueError: no more" in ended.err
    assert all(other.code for other in theirs)


def test_a_run_that_is_resumed_goes_on_to_the_bit(runner: Runner, hosts: tuple[Host, ...]) -> None:
    standing.prepare(runner, [])
    runner.write("train.py", TRAINING)
    arguments = ("train.py", "3", "0")
    ended = both_sides(start(runner, hosts, *arguments, PACELINE_CHECKPOINT_EVERY="5", PACELINE_KEEP="9"))
    expected = numbers(ended)
    (ended.directory / "numbers.json").unlink()
    for late in sorted((ended.directory / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    resume = {"PACELINE_RESUME": ended.directory.name, "PACELINE_SERVERS_APART": "", "PACELINE_JSON": "1"}
    told = both_sides(start(runner, hosts, *arguments, **resume))
    assert "goes on behind step 15" in told.err
    assert "home alone on this machine" in told.err  # as it was
    assert numbers(told) == expected


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_where_nobody_is_left_to_train_all_are_told(runner: Runner, hosts: tuple[Host, ...]) -> None:
    """Both processes are on the servers' host."""
    runner.write("forever.py", FOREVER)
    first, second = start(runner, (hosts[0], hosts[0]), "forever.py")
    theirs, ended = second.end(), first.end()
    assert (ended.code, theirs.code) == (1, 1)
    assert "servers-apart is set, and all 2 processes are on the servers' host" in ended.err
    assert "home, beside rank 0, has not started" in theirs.err
