"""Claims about what a process makes of the environment that torchrun gives it, before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.cli.home import resolved
from paceline.config import Bounded, Job
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.mirror import arithmetic
from paceline.engine.program import Order
from paceline.errors import ConfigError, HostError, UsageError
from paceline.protocol import remote
from paceline.run import beside
from paceline.run.beside import Place
from paceline.run.doors import hold_ports, is_insecure, ports_of
from paceline.run.session import init

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def order(hosts: tuple[int, ...] = (2, 2), **options: Any) -> Order:
    return Order(
        script="/somewhere/train.py",
        args=[],
        hosts=list(hosts),
        options=options,
        restarts=True,
        host="127.0.0.1",
        job="a",
        starter=1,
        report=3,
    )


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused_by_what_is_missing(name: str) -> None:
    with pytest.raises(HostError, match=f"{name} is not set"):
        beside.Rank.read({key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize(("local", "is_one"), [("4", True), ("2", False), (None, False)])
def test_only_who_has_all_ranks_beside_it_is_on_one_host(local: str | None, is_one: bool) -> None:
    known = WHOLE | ({"LOCAL_WORLD_SIZE": local} if local else {})
    assert beside.Rank.read(known).is_one_host is is_one


@pytest.mark.parametrize(("text", "insecure"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_going_without_encryption_has_to_be_said(text: str, insecure: bool) -> None:
    assert is_insecure({"PACELINE_INSECURE": text}) is insecure


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="PACELINE_INSECURE is 'maybe'"):
        is_insecure({"PACELINE_INSECURE": "maybe"})
    with pytest.raises(ConfigError, match="PACELINE_INSECURE is set, and a job key too"):
        is_insecure({"PACELINE_INSECURE": "1", "PACELINE_JOB_KEY": "00" * 32})
    with pytest.raises(HostError, match=r"MASTER_ADDR is 127.0.0.1, .* other hosts do not reach it"):
        beside._address("127.0.0.1")


def test_what_init_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_PACE", "async")
    monkeypatch.setenv("PACELINE_SEED", "7")
    job = resolved(order(pace="bounded:3"))
    assert (job.name, job.workers, job.pace, job.seed) == ("train", 4, Bounded(3), 7)


def test_what_does_not_work_elsewhere_yet_is_refused() -> None:
    with pytest.raises(UsageError, match="data is served"):
        resolved(order(data="served"))


def test_with_servers_apart_those_beside_them_are_no_workers() -> None:
    job = resolved(order((1, 3), servers=2, servers_apart=True, min_workers=3))
    assert (job.workers, job.places, job.min_workers) == (3, 3, 3)
    with pytest.raises(UsageError, match="min-workers is 3; it must be 2 or less"):
        resolved(order((2, 2), servers=2, servers_apart=True, min_workers=3))


def test_somebody_has_to_train() -> None:
    with pytest.raises(UsageError, match="all 4 processes are on the servers' host") as raised:
        resolved(order((4,), servers=2, servers_apart=True))
    assert "--nnodes N" in raised.value.fix


def test_workers_are_numbered_among_themselves() -> None:
    hosts = ["a", "b", "a", "c", "b"]
    assert Place().workers(hosts) == [0, 1, 2, 3, 4]
    assert Place(apart=["a"]).workers(hosts) == [1, 3, 4]
    assert Place(apart=["c"]).workers(hosts) == [0, 1, 2, 4]  # rank 0 may be elsewhere when all are started again
    assert Place(apart=["a", "b"]).workers(hosts) == [3]


def test_with_servers_on_several_hosts_none_of_these_trains() -> None:
    apart = {"servers_apart": True, "servers": 4}
    job = resolved(order((1, 2, 3, 2), server_hosts=2, **apart))
    assert (job.workers, job.servers_elsewhere) == (5, [1, 3])
    assert resolved(order((1, 1, 1, 2), server_hosts=3, **apart)).workers == 2
    assert resolved(order((1, 2, 3, 2), server_hosts=1, **apart)).workers == 7


@pytest.mark.parametrize(
    ("hosts", "options", "what", "fix"),
    [
        ((3, 4), {}, "server-hosts is 2, and all 7 processes are on 2 hosts: none is left to train on", "on 3 hosts"),
        ((7,), {}, "server-hosts is 2, and all 7 processes are on one host: none is left to train on", "on 3 hosts"),
        ((2, 1, 2), {}, "of 4 servers on 2 hosts, 2 are to be on host 1", "--nproc-per-node 2 there"),
        ((2, 1, 2), {"server_hosts": 5}, "server-hosts is 5, and all 5 processes are on 3 hosts", "on 6 hosts"),
        ((2, 1, 2), {"server_hosts": "2"}, "server-hosts is '2'; it must be a whole number", ""),
        ((2, 1, 2), {"server_hosts": -1}, "server-hosts is -1; it must be 1 or more", ""),
        ((2, 2, 2), {"servers_apart": False}, "server-hosts is 2, and servers-apart is not set", "PACELINE_SERVERS_A"),
    ],
)
def test_server_hosts_have_to_be_there(hosts: tuple[int, ...], options: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolved(order(hosts, **{"servers": 4, "servers_apart": True, "server_hosts": 2} | options))
    assert what in raised.value.what
    assert fix in raised.value.fix


def test_servers_are_processes_of_their_hosts_in_turn() -> None:
    hosts = ["a", "b", "c", "b", "a", "b", "d", "c"]
    apart = Place(apart=["a", "b", "c"], server_ports=[0, 501, 502, 0, 504])
    assert apart.servers(hosts) == {1: 1, 3: 4, 2: 2}  # ranks 5 and 7 have nothing to do
    assert apart.workers(hosts) == [6]
    assert Place(apart=["a"], server_ports=[0, 0]).servers(hosts) == {}


def test_ports_of_servers_elsewhere_follow_those_of_workers() -> None:
    job = Job("a", workers=2, max_workers=3, servers=5, servers_apart=True, server_hosts=2, engine="ray")
    held = hold_ports("127.0.0.1", job)
    try:
        ports = [sock.getsockname()[1] for sock in held]
        assert ports_of(job, held) == (tuple(ports[:3]), (0, ports[3], 0, ports[4], 0))
    finally:
        for sock in held:
            sock.close()


@pytest.mark.parametrize("apart", [["c", "c"], ["b", "c"], ["b", "b", "c", "c"], ["b", "c", "d"]])
def test_with_servers_no_worker_looks_for_memory_of_others(apart: list[str]) -> None:
    """Whatever hosts there are: gradients go home and parameters come back."""
    job = Job("train", workers=len(apart), servers=1, servers_apart=True, engine="torchrun")
    told = {"try": None, "host": "a", "arithmetic": arithmetic()}
    for rank in range(job.workers):
        assert Around(apart).choose(job, rank, told, is_newcomer=False) == remote.OWN


@pytest.mark.parametrize("name", ["paces", "workers", "name"])
def test_init_takes_the_options_of_a_job_only(name: str) -> None:
    with pytest.raises(UsageError, match=f"paceline.init got '{name}'; it takes: assign, "):
        init(**{name: 1})
