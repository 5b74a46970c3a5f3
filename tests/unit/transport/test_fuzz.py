"""Decoders: 20,000 damaged inputs each do nothing but be refused or taken."""

from __future__ import annotations

from typing import get_args

import pytest

from paceline.protocol import owners, ranges, remote
from tests import fuzz, fuzz_ranges, fuzz_said


@pytest.mark.parametrize("name", sorted(fuzz.targets()))
def test_damaged_bytes_do_no_harm(name: str) -> None:
    target = fuzz.targets()[name]
    found = fuzz.run(name, target, 20_000)
    assert not found, "\n".join(found[:5])


def test_a_decoder_that_fails_is_found_with_the_number_of_its_case() -> None:
    careless = fuzz.Target([b"abc"], lambda data: data.index(b"b"), ())
    found = fuzz.run("careless", careless, 100)
    assert found
    number = int(found[0].split()[4].rstrip(":"))
    assert fuzz.run("careless", careless, 1, first=number) == found[:1]


def test_no_message_between_hosts_is_missing() -> None:
    said = [message for message, _ in fuzz_said.OWNERS]
    assert {type(message) for message in said} == set(get_args(owners.Any_))
    asked = [message for message in fuzz_said.SAID if isinstance(message, remote.Ask)]
    assert {type(ask.request) for ask in asked} == set(get_args(remote.Request))
    assert {type(note) for ask in asked for note in ask.notes} == set(get_args(remote.Note))
    assert {type(message) for message in fuzz_said.SAID} == set(get_args(remote.Any_))
    assert {type(message) for _, message, _ in fuzz_ranges.SAID} == set(get_args(ranges.Any_))


@pytest.mark.parametrize("name", ["owners", "remote", "ranges", "spec"])
def test_what_is_not_damaged_is_taken(name: str) -> None:
    for sample in fuzz.targets()[name].samples[:1]:
        fuzz.targets()[name].feed(sample)
