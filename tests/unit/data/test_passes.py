"""Batches of a push that did not count come again, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paceline.data.passes import Leases, Pending, one_pass


class Passes:
    """Of a worker whose pushes may be dropped; ``told`` by the script below, as an exchange would."""

    over = False

    def __init__(self) -> None:
        self.batches_pending = Pending()
        self.told: bool | None = None

    def begin(self, loader: int, length: int | None) -> bool:
        return True

    def epoch(self, loader: int) -> int:
        return 0

    def skip(self, loader: int) -> int:
        return 0

    def deal(self, loader: int) -> None: ...

    def fetching(self) -> None: ...

    def border(self) -> None: ...

    def fetched(self, loader: int) -> None: ...

    def needs_ghost(self, loader: int) -> bool:
        return False

    def drawn(self, loader: int, samples: int) -> None: ...

    def leases(self, loader: int) -> None: ...

    def more(self, loader: int) -> bool:
        return False

    def verdict(self, loader: int) -> bool | None:
        told, self.told = self.told, None
        return told

    def pending(self, loader: int) -> Pending:
        return self.batches_pending

    def end(self, loader: int) -> None: ...

    def leave(self, loader: int) -> None: ...


def read(passes: Passes, batches: str, pushes: dict[int, bool], leave_after: int = 0) -> str:
    """One pass over ``batches``, a letter each, with a push after the n-th batch given for each n in ``pushes``, which
    counts or not: all that the script has had."""

    def mine(leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        return ((batch, 1) for batch in batches)

    had = ""
    for batch in one_pass(batches, 0, passes, mine):
        had += batch
        if len(had) in pushes:
            passes.told = pushes[len(had)]
        if len(had) == leave_after:
            break
    return had


def test_the_batches_of_a_dropped_push_come_again_before_others() -> None:
    assert read(Passes(), "abcd", {1: True, 3: False, 5: True, 6: True}) == "abcbcd"


def test_so_do_those_that_were_accumulated_over_the_end_of_a_pass() -> None:
    passes = Passes()
    assert read(passes, "abc", {2: True}) == "abc"
    assert read(passes, "de", {1: False, 3: True}) == "dcde"


def test_so_do_those_of_a_push_behind_the_end_of_a_pass() -> None:
    passes = Passes()
    read(passes, "ab", {})
    passes.told = False
    assert read(passes, "c", {3: True}) == "abc"


def test_what_counted_behind_the_end_does_not_come_again() -> None:
    passes = Passes()
    read(passes, "abc", {}, leave_after=2)
    passes.told = True
    assert read(passes, "de", {1: False, 2: True}) == "dde"


def test_an_evaluations_batches_do_not_come_again() -> None:
    passes = Passes()
    read(passes, "abc", {2: True})
    read(passes, "xyz", {})
    passes.batches_pending.forget()
    assert read(passes, "d", {1: False, 3: True}) == "dcd"


def test_a_pass_with_a_push_is_no_evaluation() -> None:
    passes = Passes()
    read(passes, "abc", {2: True})
    passes.batches_pending.forget()  # gradients may look as they did when it began
    assert read(passes, "d", {1: False, 3: True}) == "dcd"
