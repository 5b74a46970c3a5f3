"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.runner import Runner


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """Starts processes in a folder of the test's own; whatever it started has ended when the test is over."""
    own = Runner(tmp_path)
    yield own
    own.close()
