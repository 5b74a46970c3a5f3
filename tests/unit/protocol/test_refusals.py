"""Refusals: each kind is told at once, a flood of it is counted, and strangers cannot make the list long."""

from __future__ import annotations

from paceline.protocol.refusals import MAX_LINES, Refusals


def test_each_kind_is_told_at_once_and_its_like_counted() -> None:
    refusals = Refusals(every_s=10)
    assert refusals.told(0.0, "10.0.0.9:4", "no certificate") == "refused 10.0.0.9:4: no certificate"
    assert refusals.told(0.1, "10.0.0.9:5", "another job") == "refused 10.0.0.9:5: another job"
    assert [refusals.told(0.2, "10.0.0.9:6", "no certificate") for _ in range(1000)] == [None] * 1000
    assert refusals.told(10.0, "a:7", "no certificate") == "refused a:7: no certificate (and 1,000 more like it since)"
    assert refusals.told(20.0, "a:7", "no certificate") == "refused a:7: no certificate"
    assert refusals.total == 1004


def test_strangers_who_always_say_something_else_get_few_lines() -> None:
    refusals = Refusals(every_s=10)
    lines = [refusals.told(number / 1000, "a:1", f"it began with {number}") for number in range(5000)]
    assert len([line for line in lines if line]) == len(refusals._told) == MAX_LINES
    later = refusals.told(20.0, "a:1", "no certificate") or ""
    assert later.endswith(f"no certificate (and {5000 - MAX_LINES:,} others)")
    assert len(refusals._told) == 1
