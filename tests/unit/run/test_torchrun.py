"""Claims about what a process makes of the environment that torchrun gives it, before anything is started."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.cli.home import resolved
from paceline.config import Bounded
from paceline.engine.program import Order
from paceline.errors import ConfigError, HostError, UsageError
from paceline.run import torchrun
from paceline.run.doors import is_insecure
from paceline.run.session import init

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def order(**options: Any) -> Order:
    return Order(
        script="/somewhere/train.py",
        args=[],
        workers=4,
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
        torchrun._Rank.read({key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize(("local", "is_one"), [("4", True), ("2", False), (None, False)])
def test_only_who_has_all_ranks_beside_it_is_on_one_host(local: str | None, is_one: bool) -> None:
    known = WHOLE | ({"LOCAL_WORLD_SIZE": local} if local else {})
    assert torchrun._Rank.read(known).is_one_host is is_one


@pytest.mark.parametrize(("text", "insecure"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_going_without_encryption_has_to_be_said(text: str, insecure: bool) -> None:
    assert is_insecure({"PACELINE_INSECURE": text}) is insecure


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="PACELINE_INSECURE is 'maybe'"):
        is_insecure({"PACELINE_INSECURE": "maybe"})
    with pytest.raises(ConfigError, match="PACELINE_INSECURE is set, and a job key too"):
        is_insecure({"PACELINE_INSECURE": "1", "PACELINE_JOB_KEY": "00" * 32})
    with pytest.raises(HostError, match=r"MASTER_ADDR is 127.0.0.1, .* other hosts do not reach it"):
        torchrun._address("127.0.0.1")


def test_what_init_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_PACE", "async")
    monkeypatch.setenv("PACELINE_SEED", "7")
    job = resolved(order(pace="bounded:3"))
    assert (job.name, job.workers, job.pace, job.seed) == ("train", 4, Bounded(3), 7)


def test_what_does_not_work_elsewhere_yet_is_refused() -> None:
    with pytest.raises(UsageError, match="data is served"):
        resolved(order(data="served"))


@pytest.mark.parametrize("name", ["paces", "workers", "name"])
def test_init_takes_the_options_of_a_job_only(name: str) -> None:
    with pytest.raises(UsageError, match=f"paceline.init got '{name}'; it takes: assign, "):
        init(**{name: 1})
