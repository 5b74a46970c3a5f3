"""Claims about what is said to a wish for other numbers of servers where these are on several hosts."""

from __future__ import annotations

import pytest

from paceline.config import Job
from paceline.engine.launcher.wishes import Wishes
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.messages import Scale


@pytest.mark.parametrize("servers", [2, 3, 4])
def test_servers_on_several_hosts_stay_as_many(servers: int) -> None:
    job = Job("a", servers=3, engine="ray", servers_apart=True, server_hosts=2)
    answer = Wishes(job, Coordinator(2, 3)).answer(Scale(servers=servers))
    assert (answer.kind, answer.told) == ("UsageError", ())
    assert answer.what == "a run with servers on 2 hosts has the 3 servers it was started with"
    assert answer.fix == f"Ctrl-C, and go on from the checkpoint with {servers} servers"


def test_their_workers_come_and_leave() -> None:
    job = Job("a", servers=3, engine="ray", servers_apart=True, server_hosts=2)
    wishes = Wishes(job, Coordinator(2, 3))
    assert wishes.answer(Scale(workers=3)).told[0] == "3 workers instead of 2"
    assert wishes.answer(Scale()).told == ("the run has 2 workers and 3 servers",)
