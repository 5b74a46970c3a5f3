"""Decoders: 20,000 damaged inputs each, and none of them does anything but be refused or taken."""

from __future__ import annotations

import pytest

from tests import fuzz


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
