"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.namespaces import Host, missing, two_hosts
from tests.process.runner import Runner

TIMEOUT_S = 200.0  # many processes import torch, one after the other


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """Starts processes in a folder of the test's own; whatever it started has ended when the test is over."""
    own = Runner(tmp_path, TIMEOUT_S)
    yield own
    own.close()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other."""
    why = missing()
    if why:
        pytest.skip(why)
    with two_hosts() as both:
        yield both
