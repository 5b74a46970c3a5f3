"""A server elsewhere, in a process that somebody has started on a host that is not home's."""

from __future__ import annotations

from paceline.transport.keys import JobKey


def serve(server: int, job: str, address: tuple[str, int], key: JobKey | None, own_host: str | None) -> int:
    """Be server ``server`` of ``job``, whose deputy listens at ``address``, until the run is over; the exit code."""
    raise NotImplementedError
