"""What workers elsewhere share begins with the values of one of them, who alone sends them home."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

from paceline.config import parse_pace
from paceline.engine.elsewhere import mail
from paceline.transport import segment
from paceline.transport.board import Board
from tests import driver
from tests.driver import run_job

PLACES = {"beside": ("", ""), "mirror": ("", "b"), "away": ("a", "b")}
places = pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all arrays that are sent over links."""
    names: list[str] = []
    send_range = mail.send_range

    def spy(link: Any, what: str, *rest: Any) -> int:
        names.append(what)
        return send_range(link, what, *rest)

    monkeypatch.setattr(mail, "send_range", spy)
    return names


@pytest.fixture
def without_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 0 has been given up when the others come to share anything."""
    create = Board.create

    def create_without(*counts: Any, **places: Any) -> int:
        fd = create(*counts, **places)
        Board(segment.attach(fd)).given_up[0] = 1
        return fd

    monkeypatch.setattr(driver.Board, "create", create_without)


def share(run: Any) -> list[float]:
    """A frozen parameter, one with a state and the state, and a store, of the worker's own values to begin with."""
    first = run.is_main
    net = nn.Linear(3, 1, dtype=torch.float64)
    with torch.no_grad():
        net.weight.fill_(1.0 if first else 2.0)
        net.bias.fill_(3.0 if first else 4.0)
    net.bias.requires_grad_(False)
    optimizer = optim.Adagrad([net.weight], lr=0.1)
    optimizer.state[net.weight]["sum"].fill_(5.0 if first else 6.0)
    net, optimizer = run.wrap(net, optimizer)
    store = run.store(table=torch.full((2,), 7.0 if first else 8.0))
    state = optimizer.state_dict()["state"][0]["sum"]
    return [*net.weight[0].tolist(), *net.bias.tolist(), *state[0].tolist(), *store.pull("table").tolist()]


@places
@pytest.mark.parametrize("pace", ["sync", "async", "local:2", "async:2"])
def test_all_begin_with_what_the_first_has(hosts: tuple[str, ...], pace: str, sent: list[str]) -> None:
    here = run_job(share, elsewhere=False, pace=parse_pace(pace))
    assert run_job(share, elsewhere=True, hosts=hosts, pace=parse_pace(pace)) == here
    # One parameter, one that is frozen, one of a store; what Adagrad keeps beside its number of steps.
    assert [sent.count(name) for name in ("value/0", "state/1")] == [3, 1]


@places
def test_or_another_where_the_first_is_given_up(hosts: tuple[str, ...], without_first: None) -> None:
    assert run_job(share, elsewhere=False) == [[2.0] * 3 + [4.0] + [6.0] * 3 + [8.0] * 2] * 2
    assert run_job(share, elsewhere=True, hosts=hosts) == [[2.0] * 3 + [4.0] + [6.0] * 3 + [8.0] * 2] * 2
