"""Decoders: 20,000 damaged inputs each, and none of them does anything but be refused or taken."""

from __future__ import annotations

from typing import get_args

import pytest

from paceline.protocol import owners, remote
from tests import fuzz, fuzz_said


@pytest.mark.parametrize("name", sorted(fuzz.targets()))
def test_damaged_bytes_do_no_harm(name: str) -> None:
    found = fuzz.run(name, fuzz.targets()[name], 20_000)
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


@pytest.mark.parametrize("name", ["owners", "remote"])
def test_what_is_not_damaged_is_taken(name: str) -> None:
    for sample in fuzz.targets()[name].samples[:1]:
        fuzz.targets()[name].feed(sample)
