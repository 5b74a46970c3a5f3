"""Workers and servers of one job as threads of this process: real board, real slots, real coordinator.

Everything but the fork is what runs in production, and a job takes milliseconds, so that hypothesis can
try many.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import HashStore

from paceline.config import Job
from paceline.engine.context import Context
from paceline.engine.elsewhere import range_deputy
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.deputizing import deputize
from paceline.engine.elsewhere.range_server import RangeServer, Stopped
from paceline.engine.exchange.server import serve
from paceline.engine.setup import Door
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.effects import (
    Abort,
    Allocate,
    Came,
    Died,
    Done,
)
from paceline.protocol.ranges import is_elsewhere
from paceline.run.elsewhere import meet
from paceline.run.session import Run
from paceline.transport import segment
from paceline.transport.board import Aborted, Board
from paceline.transport.borrow import this_host
from paceline.transport.channel import Channel, Closed
from paceline.transport.keys import JobKey
from paceline.transport.listener import hold
from paceline.transport.lock import Lock


class Failed(Exception):
    """The job was aborted; ``failure`` is what the coordinator was told."""

    def __init__(self, failure: messages.Failed) -> None:
        super().__init__(failure.what)
        self.failure = failure


ELSEWHERE = bool(os.environ.get("ELSEWHERE"))  # all jobs of a test run so, to look for differences
_KEY = JobKey(bytes(range(32)))
_finished: list[Any] = []  # jobs are kept: where they are freed, a process that has many crashes now and then


def run_job(
    body: Callable[[Run], Any],
    *,
    workers: int = 2,
    servers: int = 0,
    elsewhere: bool = ELSEWHERE,
    hosts: Sequence[str] = (),
    **options: Any,
) -> list[Any]:
    """What ``body(run)`` returned in each worker, by rank. Raises what a worker raised first, or Failed.

    ``elsewhere``: each worker is a stub with a deputy, over a link; ``hosts``: on the host of that name, "" is home's.
    """
    job = Job(name="test", workers=workers, servers=servers, **options)
    board_fd = Board.create(workers, servers, places=(job.places, job.server_places))
    board = Board(segment.attach(board_fd))
    events: list[tuple[str, int, Any]] = []
    arrived = threading.Condition()
    channels: dict[tuple[str, int], Channel] = {}
    results: dict[int, Any] = {}
    notes = HashStore()
    directory = Path(tempfile.mkdtemp())
    errors: list[BaseException] = []

    def put(role: str, rank: int, event: Any) -> None:
        with arrived:
            events.append((role, rank, event))
            arrived.notify()

    def listen(role: str, rank: int) -> None:
        channel = channels[role, rank]
        try:
            while True:
                for message, _ in channel.drain():
                    put(role, rank, message)
        except Closed:
            put(role, rank, None)

    def live(role: str, rank: int, channel: Channel) -> None:
        board = Board(segment.attach(board_fd))
        context = Context(job, role, rank, directory, channel, board, Lock(board_fd, board.journal))
        try:
            if role == "server" and is_elsewhere(rank, job.server_hosts):
                _serve_elsewhere(context)
            elif role == "server":
                serve(context)
            elif elsewhere:
                around = Around([name or this_host() for name in hosts], notes)
                results[rank] = _live_elsewhere(context, body, around)
            else:
                run = Run(context)
                _finished.append(run)
                results[rank] = body(run)
                assert run.worker is not None
                run.worker.finish()
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001  the outermost line of a thread that stands for a process
            errors.append(error)
            board.set_abort()
        finally:
            channel.close()

    threads = []
    for role, count in (("server", servers), ("worker", workers)):
        for rank in range(count):
            mine, its = Channel.pair()
            channels[role, rank] = mine
            threads.append(threading.Thread(target=listen, args=(role, rank), daemon=True))
            threads.append(threading.Thread(target=live, args=(role, rank, its), daemon=True))
    for thread in threads:
        thread.start()

    coordinator = Coordinator(workers, servers)
    failure: messages.Failed | None = None
    alive = workers + servers
    while alive:
        with arrived:
            if not arrived.wait_for(lambda: events, timeout=60):
                faulthandler.dump_traceback(sys.__stderr__)  # where each of its threads stands
                board.set_abort()  # what is left of it would be in the way of the tests that follow
                raise AssertionError("the job hangs")
            role, rank, message = events.pop(0)
        if message is None:
            alive -= 1
            effects = coordinator.handle(Died(role, rank, 0, 0)) if not errors else []
        else:
            effects = coordinator.handle(Came(role, rank, message))
        for effect in effects:
            match effect:
                case Allocate(request=request, servers=to_servers):
                    _give(channels, request, to_servers)
                case Abort(failure=said):
                    failure = said
                    board.set_abort()
                    _say_stop(channels, said.what)
                case Done():
                    _say_stop(channels, "done")
                    board.wake_all()  # as the launcher does: servers sleep, and would look half a second later
        if errors:
            _say_stop(channels, "failed")
    for thread in threads:
        thread.join(timeout=10)
    for channel in channels.values():
        channel.close()
    os.close(board_fd)
    shutil.rmtree(directory)
    if errors:
        raise errors[0]
    if failure is not None:
        raise Failed(failure)
    return [results[rank] for rank in range(workers)]


def _live_elsewhere(context: Context, body: Callable[[Run], Any], around: Around) -> Any:
    """The deputy in a thread of its own, and its worker here."""
    readable, writable = os.pipe()
    held = hold("127.0.0.1")
    ports = [held.getsockname()[1]] * (context.rank + 1)
    raised: list[BaseException] = []

    def stand() -> None:
        try:
            deputize(
                context, Door("127.0.0.1", ports, "job", os.getpid(), insecure=False), writable, _KEY, _finished.append
            )
        except BaseException as error:  # noqa: BLE001  the outermost line of a thread that stands for a process
            raised.append(error)
            context.board.set_abort()
        finally:
            os.close(writable)

    deputy = threading.Thread(target=stand, daemon=True)
    deputy.start()
    with os.fdopen(readable) as lines:
        lines.readline()
    worker = meet(context.rank, 0, "job", ("127.0.0.1", ports[-1]), _KEY, around)
    held.close()
    run = Run(None, worker)
    _finished.append(run)
    try:
        result = body(run)
        worker.finish()
    except SystemExit as end_:
        raise (raised[0] if raised else Aborted(str(end_))) from None
    except BaseException:
        worker.abandon()
        context.board.set_abort()
        raise
    deputy.join(timeout=10)
    return result


def _serve_elsewhere(context: Context) -> None:
    """The deputy here, and its server in a thread of its own."""
    readable, writable = os.pipe()
    held = hold("127.0.0.1")
    ports = [held.getsockname()[1]] * (context.rank + 1)
    raised: list[BaseException] = []

    def be() -> None:
        with os.fdopen(readable) as lines:
            lines.readline()
        try:
            RangeServer(context.rank, "job", ("127.0.0.1", ports[-1]), _KEY).serve()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  the outermost line of a thread that stands for a process
            raised.append(error)

    server = threading.Thread(target=be, daemon=True)
    server.start()
    door = Door("127.0.0.1", [], "job", os.getpid(), insecure=False, server_ports=ports)
    try:
        range_deputy.deputize(context, door, writable, _KEY)
    finally:
        os.close(writable)
        held.close()
        server.join(timeout=10)
    if raised:
        raise raised[0]


def _give(channels: dict[tuple[str, int], Channel], request: messages.Wrap, servers: bool) -> None:
    fd = segment.create(request.what, request.size_bytes)
    memory = messages.Memory(request.number, request.size_bytes, request.kind, request.spec)
    for (role, _), channel in channels.items():
        if role == "worker" or servers:
            channel.send(memory, (fd,))
    os.close(fd)


def _say_stop(channels: dict[tuple[str, int], Channel], reason: str) -> None:
    for channel in channels.values():
        try:
            channel.send(messages.Stop(reason))
        except (Closed, OSError):
            continue
