"""Claims about three hosts and more, a worker on each: what all bring is folded in shares, one by each host, and the
parameters are the same bits on all. The oracle is the same job with local workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from paceline.engine.elsewhere import early, owners, peers
from paceline.engine.elsewhere.remote_host import RemoteHost
from paceline.errors import ConfigError
from paceline.protocol import owners as protocol
from tests.driver import run_job
from tests.unit.engine.test_hosts import CLIPS, Seen, both, clipping, evaluating, leaving_out, loading
from tests.unit.engine.test_hosts import seen as seen
from tests.unit.engine.test_remote import EPOCHS, MAKES, SAMPLES, count, drawn, several, train

PLACES = {"3": ("", "b", "c"), "4": ("", "b", "c", "d")}
# Hosts with several workers, which are folded there first.
SEVERAL = {"2+2+1": ("", "b", "c", "b", ""), "1+2+1": ("", "b", "b", "c"), "2+2+2": ("", "", "b", "b", "c", "c")}
ONE_OF_THEM = [
    pytest.param(places, id=name, marks=[] if name in ("3", "2+2+1") else pytest.mark.long)
    for name, places in (PLACES | SEVERAL).items()
]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_hosts_that_fold_in_shares_train_as_one(
    make: Callable[[Any], optim.Optimizer], places: tuple[str, ...], seen: Seen
) -> None:
    apart, one = both(lambda run: train(run, make), places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (EPOCHS * -(-SAMPLES // 4 // len(places)), 0)


@pytest.mark.parametrize("places", SEVERAL.values(), ids=SEVERAL)
def test_what_several_workers_of_a_host_bring_is_folded_there_first(places: tuple[str, ...], seen: Seen) -> None:
    apart, one = both(lambda run: train(run, MAKES["adam"]), places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    # Of 12 batches five workers have two, and two of them a third, alone; nor is the round after that one.
    rounds = EPOCHS * (SAMPLES // 4 // len(places)) - (EPOCHS - 1 if len(places) == 5 else 0)
    assert (seen.as_one, seen.left) == (rounds, 0)


@pytest.mark.parametrize("places", ONE_OF_THEM)
@pytest.mark.parametrize("bytes_", [(64, 128), (early.BUCKET_BYTES, owners.SHARE_BYTES)])
def test_passes_may_be_uneven_and_gradients_missing_or_changed(
    places: tuple[str, ...], bytes_: tuple[int, int], monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", bytes_[0])
    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    monkeypatch.setattr(owners, "SHARE_BYTES", bytes_[1])
    apart, one = both(several, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", ONE_OF_THEM)
@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_evaluations_and_gradients_that_are_not_finite(places: tuple[str, ...], bad: int | None, seen: Seen) -> None:
    apart, one = both(lambda run: evaluating(run, bad=bad), places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", ONE_OF_THEM)
@pytest.mark.parametrize("assign", ["lease", "round_robin"])
def test_each_sample_counts_once_an_epoch(places: tuple[str, ...], assign: str) -> None:
    there = run_job(lambda run: count(run, "plain"), workers=len(places), elsewhere=True, hosts=places, assign=assign)
    assert there == [[float(EPOCHS)] * SAMPLES] * len(places)


@pytest.mark.parametrize("how", [{"norm": True}, {"clip": True}], ids=str)
def test_so_it_is_with_batch_norm_and_with_clipping(how: dict[str, bool], seen: Seen) -> None:
    apart, one = both(lambda run: train(run, MAKES["momentum"], **how), PLACES["4"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.norms > 0, seen.left) == ("clip" in how, 0)


# As scripts clip: is what all bring folded in shares? A fold has one factor, and is not made twice in a round.
FOLDED = {"by norm": True, "by its own means": False, "in several calls": False, "one drops one after it": False}
FOLDED_TOO = dict.fromkeys(["seldom", "by the largest", "order 3"], True)
FOLDED_TOO |= dict.fromkeys(CLIPS.keys() - FOLDED.keys() - FOLDED_TOO.keys(), False)


@pytest.mark.parametrize(
    ("name", "as_one"),
    [*FOLDED.items(), *(pytest.param(*each, marks=pytest.mark.long) for each in sorted(FOLDED_TOO.items()))],
)
def test_a_norm_is_that_of_all_and_the_fold_is_clipped(name: str, as_one: bool, seen: Seen) -> None:
    there = run_job(lambda run: clipping(run, CLIPS[name][0]), workers=4, elsewhere=True, hosts=PLACES["4"])
    here = run_job(lambda run: clipping(run, CLIPS[name][0]), workers=4, elsewhere=False)
    assert all(one == there[0] for one in there)
    for found, wanted in zip(there[0], here[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert any(norm > 0.5 for norm in there[0][0])
    assert (seen.as_one, seen.left) == (9 if as_one else 0, 0)
    assert seen.norms


@pytest.mark.parametrize("places", ONE_OF_THEM)
def test_the_option_clips_likewise(places: tuple[str, ...], seen: Seen) -> None:
    apart, one = both(several, places, clip=0.2)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.norms
    assert not seen.left


@pytest.mark.parametrize("bad", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_gradient_that_is_not_finite_is_in_no_norm(bad: int, seen: Seen) -> None:
    apart, one = both(lambda run: evaluating(run, bad=bad), PLACES["3"], clip=0.2)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one == seen.norms > 0
    assert not seen.left


@pytest.mark.parametrize("places", [PLACES["3"], ("", "", "b", "b")], ids=["3", "2+2"])
def test_a_table_of_which_all_values_are_brought_is_clipped(places: tuple[str, ...], seen: Seen) -> None:
    """With momentum each value of a table changes in each step: its gradient is sparse, and brought as a dense one."""

    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        table, optimizer = run.wrap(table, optim.SGD(table.parameters(), lr=0.1, momentum=0.9))
        for step in range(4):
            optimizer.zero_grad()
            table(torch.arange(step, step + 4) * (run.rank + 1) % 20).pow(2).sum().backward()
            if step % 2:
                nn.utils.clip_grad_norm_(table.parameters(), 0.5)
            optimizer.step()
        return list(table.weight.flatten().tolist())

    apart, one = both(body, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.norms, seen.left) == (4, 2, 0)


@pytest.mark.parametrize("without", [0, 1])
def test_who_steps_without_clipping_is_told(without: int) -> None:
    how = CLIPS["by norm"][0]
    with pytest.raises(ConfigError, match=rf"clips its gradients in round 1, worker {without} does not"):
        run_job(
            lambda run: clipping(run, (lambda *_: []) if run.rank == without else how),
            workers=3,
            elsewhere=True,
            hosts=PLACES["3"],
        )


def test_a_step_may_be_left_out_after_its_norm(seen: Seen) -> None:
    apart, one = both(leaving_out, PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert not seen.left


@pytest.mark.parametrize("places", ONE_OF_THEM)
def test_what_scripts_load_counts_for_all(places: tuple[str, ...], seen: Seen) -> None:
    assert run_job(loading, workers=len(places), elsewhere=True, hosts=places) == [(pytest.approx(6.0), 4.0)] * len(
        places
    )
    assert (seen.as_one, seen.left) == (4, 0)


def kinds_in(message: protocol.Said) -> set[str]:
    """Of what is said with it."""
    enclosed = message.enclosed if isinstance(message, protocol.Letter) else []
    return {type(said).__name__ for said in (message, *(one.said for one in enclosed))}


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.long)])  # who has connected tries again for long
@pytest.mark.parametrize("kind", ["Part", "Fold", "Given", "Folded"])
def test_a_link_that_ends_between_two_of_them_makes_it_a_star(
    rank: int, kind: str, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """In the midst of a round, as something is sent over it: home may have the folds, and one of them not."""
    send, sent = peers.Peers.send, 0

    def send_or_end(self: Any, other: int, message: Any, payload: Any = None) -> None:
        nonlocal sent
        if (self.rank, other) == (rank, 3 - rank) and kind in kinds_in(message):
            sent += 1
            if sent == 4:
                self._links[other].end("it is cut")
        send(self, other, message, payload)

    monkeypatch.setattr(peers.Peers, "send", send_or_end)
    monkeypatch.setattr(protocol, "_GRAIN", 1)
    apart, one = both(lambda run: train(run, MAKES["adam"]), PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert seen.left == 3


def test_who_comes_to_its_end_first_is_not_missed(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Worker 2 has left already when worker 1 looks behind its last step whether it still reaches all."""
    check, changed, has_left, steps, looks = RemoteHost.check, owners.Owners.changed, threading.Event(), 4, 0

    def look(self: Any, one: Any, *, is_over: bool) -> None:
        nonlocal looks
        if one.owners is not None and self._rank == 1:
            looks += 1
            assert looks < steps or has_left.wait(20)
        check(self, one, is_over=is_over)

    def change(self: Any) -> None:
        if self._rank == 1:
            has_left.set()
        changed(self)

    monkeypatch.setattr(RemoteHost, "check", look)
    monkeypatch.setattr(owners.Owners, "changed", change)

    def body(run: Any) -> float:
        net = nn.Linear(1, 1, bias=False)
        net, optimizer = run.wrap(net, optim.SGD(net.parameters(), lr=1.0))
        net.load_state_dict({"weight": torch.zeros(1, 1)})
        for _ in range(steps):
            net.weight.grad = torch.ones_like(net.weight)
            optimizer.step()
        return float(net.weight.detach())

    assert run_job(body, workers=3, elsewhere=True, hosts=PLACES["3"]) == [-steps] * 3
    assert (seen.as_one, seen.left, looks) == (steps, 0, steps)


def test_where_one_is_not_reached_it_is_a_star_from_the_beginning(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Also where it has left again before the others look: they wait for no link that has ended."""
    meet, stop, are_all, has_left = peers.Peers.meet, peers.Peers.stop, peers.Peers.are_all, threading.Event()

    def stopped(self: Any) -> None:
        stop(self)
        if self.rank == 1:
            has_left.set()

    def looked(self: Any) -> bool:
        assert self.rank == 1 or has_left.wait(20)
        return bool(are_all.fget(self))

    monkeypatch.setattr(peers.Peers, "meet", lambda self: meet(self) and self.rank != 1)
    monkeypatch.setattr(peers.Peers, "stop", stopped)
    monkeypatch.setattr(peers.Peers, "are_all", property(looked))
    monkeypatch.setattr(peers, "_MEET_S", 1000.0)
    apart, one = both(lambda run: train(run, MAKES["adam"]), PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one == 0
