"""Who is out for gradients that are not finite, and when the run is over for them."""

from __future__ import annotations

import pytest

from paceline.protocol.strikes import RECENT, Verdict, in_a_row, judge, marked


def marks(text: str) -> int:
    """Of gradients, the newest last: x for a strike."""
    found = 0
    for one in text:
        found = marked(found, strike=one == "x")
    return found


@pytest.mark.parametrize(("text", "row"), [("", 0), (".", 0), ("x", 1), ("x.xx", 2), ("xxx", 3), ("xxx.", 0)])
def test_strikes_in_a_row_end_with_a_good_gradient(text: str, row: int) -> None:
    assert in_a_row(marks(text)) == row


def test_what_lies_far_behind_is_forgotten() -> None:
    assert marks("x" + "." * RECENT) == 0


@pytest.mark.parametrize("text", ["x", "xx", "xx.x", "xx.xx", "x." * 8 + "x", ".x" * 40])
def test_few_strikes_are_forgiven(text: str) -> None:
    assert judge(marks(text), []) is Verdict.GO_ON


@pytest.mark.parametrize("text", ["xxx", "....xxx", "xx." * 5 + "xx"])
@pytest.mark.parametrize("others", [["...."], ["x..."], ["..x", "..."], ["...", "...", "xxx"]])
def test_one_with_too_many_is_out_while_most_gradients_are_good(text: str, others: list[str]) -> None:
    assert judge(marks(text), [marks(other) for other in others]) in {Verdict.OUT, Verdict.GO_ON}
    assert judge(marks(text), [0]) is Verdict.OUT


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("xxx", []),  # alone
        ("xxx", ["xxx"]),
        ("xxx", [".xx"]),  # whose third is not known yet
        ("xxx", ["xx", "..."]),
        ("xx." * 5 + "xx", ["x.x" * 5 + "x"]),
    ],
)
def test_if_most_gradients_are_strikes_nobody_is_to_blame(text: str, others: list[str]) -> None:
    assert judge(marks(text), [marks(other) for other in others]) is Verdict.DIVERGED
