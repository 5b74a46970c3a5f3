"""Models of tests are small: half of the tests treat what they send as large."""

from __future__ import annotations

from zlib import crc32

import pytest

from paceline.engine.elsewhere import early, mail


@pytest.fixture(autouse=True)
def _small_or_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gradients go in one message with the step, large ones before it, in messages of their own. Which test does
    what is always the same."""
    if crc32(request.node.name.encode()) % 2:
        monkeypatch.setattr(early, "LEAST_BYTES", 0)
        monkeypatch.setattr(mail, "LETTER_BYTES", 0)
