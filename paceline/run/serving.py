"""A server elsewhere, in a process that somebody has started on a host that is not home's."""

from __future__ import annotations

import signal
import sys
import threading

from paceline.engine.elsewhere.line import STOPPED
from paceline.engine.elsewhere.range_server import RangeServer, Stopped
from paceline.transport.keys import JobKey


def serve(server: int, job: str, address: tuple[str, int], key: JobKey | None, own_host: str | None) -> int:
    """Be server ``server`` of ``job``, whose deputy listens at ``address``, until the run is over; the exit code.

    ``own_host``: the address that workers come to; None: that of the way home. Asked to end, it has the run end behind
    one step: without it there is none. Raises HostError if home cannot be reached, ConfigError for an optimizer whose
    class is not here.
    """
    serving = RangeServer(server, job, address, key, own_host)
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            sys.exit(STOPPED)
        told = threading.Thread(target=serving.terminated, daemon=True)  # what is interrupted may be just sending
        told.start()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
    try:
        serving.serve()
    except Stopped as stopped:
        sys.stderr.write(f"paceline: server {server} ends: {stopped}\n")
        return STOPPED
    return 0
