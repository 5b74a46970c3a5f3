"""Arrays over a link: small ones go together in one message, large ones on their own, all in their order."""

from __future__ import annotations

import pytest
import torch

from paceline.engine.elsewhere import mail
from paceline.engine.elsewhere.mail import Letters, Mail
from paceline.protocol import remote
from paceline.transport.ends import Received
from tests.hosts.ends import WAIT_S, Pair


@pytest.mark.parametrize("most", [0, 20, 128 * 1024])
def test_small_arrays_come_together_and_in_order(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "LETTER_BYTES", most)
    come = Mail()
    first, large, numbers = torch.arange(10.0), torch.rand(100_000), torch.tensor([3, 1])
    with Pair(messages=remote.Any_, place=come.place) as pair:
        letters = Letters(pair.join())
        sizes = [
            letters.add("first", first, 2, 6),
            letters.add("large", large, 0, 100_000),
            letters.add("none", torch.zeros(0), 0, 0),
            letters.add("numbers", numbers, 0, 2),
            letters.add("first", first, 6, 10),
        ]
        pair.near.send(remote.Ask([], remote.Meet({}), letters.take()))
        if most:
            numbers.zero_()  # what is enclosed was copied
        pair.near.flush(WAIT_S)
        assert sizes == [16, 400_000, 0, 16, 16]
        said = []
        while not said or not isinstance(said[-1], remote.Ask):
            event = pair.server.events.get(timeout=WAIT_S)
            if isinstance(event, Received):
                come.open(event.message)
                said.append(event.message)
    kinds = [type(message).__name__ for message in said]
    expected = {
        0: ["Piece"] * 4 + ["Ask"],
        20: ["Letter", "Piece", "Letter", "Ask"],
        128 * 1024: ["Letter", "Piece", "Ask"],
    }
    assert kinds == expected[most]
    assert come.take("first", torch.float32).tolist() == [0.0, 0.0, *range(2, 10)]
    assert torch.equal(come.take("large", torch.float32), large)
    assert come.take("numbers", torch.int64).tolist() == [3, 1]
