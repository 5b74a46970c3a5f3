"""Named tensors used directly: what is pushed is applied once, and what is pulled has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import optim

from paceline.errors import ConfigError, UsageError
from paceline.protocol import remote
from paceline.run.session import Run
from tests.driver import run_job

places = pytest.mark.parametrize(
    "place", [{}, {"servers": 1}, {"servers": 3}, {"elsewhere": True}, {"servers": 2, "elsewhere": True}], ids=str
)


@places
@pytest.mark.parametrize("pace", ["sync", "async", "bounded:1", "quorum:2", "local:4"])
def test_all_that_is_pushed_is_added_up(place: dict[str, Any], pace: str) -> None:
    from paceline.config import parse_pace

    def body(run: Any) -> list[float]:
        store = run.store(a=torch.zeros(200, dtype=torch.float64), b=torch.full((3,), 5.0))
        for number in range(20):
            store.push(a=torch.full((200,), float(run.rank + 1), dtype=torch.float64))
            if number % 2:
                store.push(b=torch.ones(3))
        store.wait()
        run.barrier()
        return [*sorted(set(store.pull("a").tolist())), *sorted(set(store.pull("b").tolist()))]

    results = run_job(body, workers=3, pace=parse_pace(pace), **place)
    assert results == [[20.0 * (1 + 2 + 3), 5.0 + 3 * 10]] * 3


@places
def test_a_worker_sees_its_own_push_after_waiting_for_it(place: dict[str, Any]) -> None:
    def body(run: Any) -> bool:
        store = run.store(mine=torch.zeros(run.num_workers))
        seen = True
        for number in range(1, 30):
            one = torch.zeros(run.num_workers)
            one[run.rank] = 1.0
            handle = store.push(mine=one)
            store.wait(handle)
            seen = seen and store.pull("mine")[run.rank].item() == number
        return seen

    assert run_job(body, workers=2, **place) == [True, True]


@places
def test_with_an_optimizer_what_is_pushed_is_a_gradient(place: dict[str, Any]) -> None:
    """The oracle: the same optimizer, stepped with the same gradients; what is not pushed is not stepped."""
    expected = [torch.nn.Parameter(torch.ones(70)), torch.nn.Parameter(torch.ones(5))]
    plain = optim.Adam(expected, lr=0.1)
    for number in range(6):
        expected[0].grad = torch.full((70,), 1.0 + number)
        expected[1].grad = torch.ones(5) if number % 3 == 0 else None
        plain.step()

    def body(run: Any) -> list[torch.Tensor]:
        store = run.store(w=torch.ones(70), v=torch.ones(5), optimizer=lambda p: optim.Adam(p, lr=0.1))
        for number in range(6):
            also = {"v": torch.ones(5)} if number % 3 == 0 else {}
            store.push(w=torch.full((70,), 1.0 + number), **also)
        return [store.pull("w"), store.pull("v")]

    (found,) = run_job(body, workers=1, **place)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its.detach())


def test_the_first_workers_values_are_what_all_begin_with() -> None:
    def body(run: Any) -> list[float]:
        return run.store(w=torch.full((4,), float(run.rank + 7))).pull("w").tolist()  # type: ignore[no-any-return]

    assert run_job(body, workers=3) == [[7.0] * 4] * 3


def test_stores_and_models_stand_beside_each_other() -> None:
    def body(run: Any) -> tuple[float, float]:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = run.wrap(optim.SGD([weight], lr=1.0))
        store = run.store(seen=torch.zeros(1))
        for _ in range(4):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
            store.push(seen=torch.ones(1))
        store.wait()
        run.barrier()
        return weight.item(), store.pull("seen").item()

    assert run_job(body, workers=2) == [(4.0, 8.0)] * 2


def test_alone_a_store_is_a_few_tensors() -> None:
    run = Run(None)
    store = run.store(w=torch.zeros(2))
    handle = store.push(w=torch.ones(2))
    store.wait(handle)
    run.barrier()
    pulled = store.pull("w")
    pulled += 10
    assert store.pull("w").tolist() == [1.0, 1.0]
    assert store.names == ("w",)


@pytest.mark.parametrize(
    ("act", "kind", "says"),
    [
        (lambda run: run.store(), UsageError, "run.store needs at least one tensor"),
        (lambda run: run.store(n=torch.zeros(2, dtype=torch.int64)), ConfigError, "n is torch.int64; a store holds"),
        (lambda run: run.store(w=torch.zeros(2)).push(), UsageError, "push needs a value for one of: w"),
        (lambda run: run.store(w=torch.zeros(2)).push(x=torch.zeros(2)), ConfigError, "has no tensor 'x'; it has: w"),
        (
            lambda run: run.store(w=torch.zeros(2)).push(w=torch.zeros(3)),
            ConfigError,
            r"push of w has shape \[3\]; it must be \[2\]",
        ),
        (lambda run: run.store(w=torch.zeros(2)).wait(1), UsageError, "wait got handle 1; 0 pushes were made"),
    ],
)
def test_mistakes_are_answered_in_words(act: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        act(Run(None))


STRAY = torch.sparse_coo_tensor([[1, 9]], torch.ones(2, 3), (4, 3), check_invariants=False)
WRONG = {
    "push of a has shape [3, 4]; it must be [4, 3]": torch.ones(3, 4),
    "push of a has row 9; there are rows 0 to 3": STRAY,
    "push of a has row -1; there": torch.sparse_coo_tensor([[-1]], torch.ones(1, 3), (4, 3), check_invariants=False),
    "push of a has dtype torch.complex64; it must be real": torch.ones(4, 3, dtype=torch.complex64),
    "push of a is a list; it must be a tensor": [[1.0] * 3] * 4,
    "push of a has values that are not finite": torch.full((4, 3), float("nan")),
}


@places
@pytest.mark.parametrize("told", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(told: str, place: dict[str, Any]) -> None:
    def body(run: Any) -> list[str]:
        store = run.store(a=torch.zeros(4, 3), b=torch.zeros(2))
        with pytest.raises(ConfigError) as caught:
            store.push(b=torch.ones(2), a=WRONG[told])
        store.push(a=torch.sparse_coo_tensor([[3]], torch.ones(1, 3), (4, 3)))
        store.wait()
        run.barrier()
        assert store.pull("a").sum(1).tolist() == [0, 0, 0, 6]
        assert store.pull("b").tolist() == [0, 0]
        return [caught.value.what]

    for what in run_job(body, workers=2, **place):
        assert what[0].startswith(told)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (remote.PushStore(0, {9: 0}, b""), "the store has 1 tensors, there is no number 9"),
        (remote.PushStore(0, {0: 0}, b""), r"push of a does not fit \[4, 3\]"),
        (remote.PushStore(0, {0: 5}, b""), "push of a has indices of 5 dimensions, the tensor has 2"),
        (remote.PullStore(0, 1), "the store has 1 tensors, there is no number 1"),
        (remote.AwaitStore(1), "there is no store 1; worker 0 has made 1"),
    ],
)
def test_home_refuses_what_does_not_fit_by_itself(asked: remote.Request, says: str) -> None:
    def body(run: Any) -> list[float]:
        store = run.store(a=torch.zeros(4, 3))
        with pytest.raises(ConfigError, match=says):
            run.worker.ask(asked)
        store.push(a=torch.ones(4, 3))
        return store.pull("a").unique().tolist()  # type: ignore[no-any-return]

    assert run_job(body, workers=1, elsewhere=True) == [[1.0]]
