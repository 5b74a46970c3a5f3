"""Refusals: each kind is told at once, a flood of it is counted, and strangers cannot make the list long."""

from __future__ import annotations

from paceline.protocol.refusals import MAX_KINDS, Refusals


def test_each_kind_is_told_at_once_and_its_like_counted() -> None:
    refusals = Refusals(every_s=10)
    assert refusals.told(0.0, "10.0.0.9:4", "no certificate") == "refused 10.0.0.9:4: no certificate"
    assert refusals.told(0.1, "10.0.0.9:5", "another job") == "refused 10.0.0.9:5: another job"
    assert [refusals.told(0.2, "10.0.0.9:6", "no certificate") for _ in range(1000)] == [None] * 1000
    assert refusals.told(10.0, "a:7", "no certificate") == "refused a:7: no certificate (and 1,000 more since)"
    assert refusals.told(20.0, "a:7", "no certificate") == "refused a:7: no certificate"
    assert refusals.total == 1004


def test_the_list_of_kinds_is_bounded() -> None:
    refusals = Refusals()
    for number in range(10 * MAX_KINDS):
        assert refusals.told(float(number), "a:1", f"reason {number}") is not None
    assert len(refusals._kinds) == MAX_KINDS
