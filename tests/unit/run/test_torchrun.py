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
from paceline.run.doors import is_insecure
from paceline.run.session import init

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def order(ranks_at_home: int = 2, **options: Any) -> Order:
    return Order(
        script="/somewhere/train.py",
        args=[],
        workers=4,
        beside=ranks_at_home,
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
    job = resolved(order(ranks_at_home=1, servers=2, servers_apart=True, min_workers=3))
    assert (job.workers, job.places, job.min_workers) == (3, 3, 3)
    with pytest.raises(UsageError, match="min-workers is 3; it must be 2 or less"):
        resolved(order(ranks_at_home=2, servers=2, servers_apart=True, min_workers=3))


def test_somebody_has_to_train() -> None:
    with pytest.raises(UsageError, match="all 4 processes are on the servers' host") as raised:
        resolved(order(ranks_at_home=4, servers=2, servers_apart=True))
    assert "--nnodes N" in raised.value.fix


def test_workers_are_numbered_among_themselves() -> None:
    hosts = ["a", "b", "a", "c", "b"]
    assert Place().workers(hosts) == [0, 1, 2, 3, 4]
    assert Place(apart="a").workers(hosts) == [1, 3, 4]
    assert Place(apart="c").workers(hosts) == [0, 1, 2, 4]  # rank 0 may be elsewhere when all are started again


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
