"""The life of a deputy: the process at home that stands for a worker elsewhere, and is the worker to everybody here.

It listens at its worker's door, tells whoever starts workers that it waits there, and serves the one that comes
(``deputy.py``) until its script is over. If the link is lost for good it ends, as its worker has. The next one
waits at the same port for a worker that comes in the place of the lost one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from paceline.config import Sync
from paceline.engine.context import Context
from paceline.engine.elsewhere.deputy import Deputy
from paceline.engine.elsewhere.deputy_line import DeputyLine, next_event, say_stop, tell_starter
from paceline.engine.elsewhere.mail import PATIENCE, Mail, send_packed
from paceline.engine.program import CAME, GONE, WAITS
from paceline.engine.setup import Door
from paceline.engine.worker.keeping import Keeper, Kept
from paceline.engine.worker.worker import Worker
from paceline.errors import HostError, NotBack, WorkersLost
from paceline.params.packing import Tensors, unpack
from paceline.protocol import messages, remote
from paceline.protocol.link import Peer
from paceline.transport.board import AWAITS_ITS_WORKER, Aborted
from paceline.transport.channel import Closed
from paceline.transport.ends import End, Joined
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.tls import Credentials


def deputize(context: Context, door: Door, report: int, key: JobKey | None, made: Callable[[Worker], None]) -> None:
    """Stand for worker ``context.rank`` until its script is over. Raises WorkersLost, HostError, Aborted.

    ``made`` is told the Worker that this process then is.
    """
    mail = Mail()
    end = End(
        me=Peer(context.rank, "deputy"),
        job=door.job,
        messages=remote.Any_,
        sink=mail.sink,
        place=mail.place,
        credentials=None if key is None else Credentials.issue(key),
        insecure=door.insecure,
        patience=PATIENCE,
    )
    listener = Listener(end, door.host, door.ports[context.rank], shared=True)
    tell_starter(report, str(context.rank), WAITS)
    try:
        link = _await_worker(context, mail, door.starter)
    except NotBack:
        tell_starter(report, str(context.rank), GONE)
        raise
    tell_starter(report, str(context.rank), CAME)
    end_all = partial(context.channel.send, messages.Interrupt(1))
    line = DeputyLine(context.rank, context.board, link, mail, context.job.hang_timeout, end_all)
    own = context
    if isinstance(context.job.pace, Sync):
        own = replace(context, job=replace(context.job, clip=None))  # the worker does so itself
    keeper = _KeptElsewhere(line)
    worker = Worker(own, keeper)
    made(worker)
    deputy = Deputy(context, worker, line)
    keeper.loaded = deputy.take_buffers
    try:
        deputy.serve()
    except (Aborted, Closed) as stopped:
        say_stop(context, link, str(stopped))
        raise
    except (SystemExit, WorkersLost):
        raise
    except BaseException as error:  # whatever it is, the worker hears of it before it is raised again
        say_stop(context, link, f"its deputy at home failed: {error}")
        raise
    finally:
        deputy.stop()
        link.close()
        listener.close()


def _await_worker(context: Context, mail: Mail, starter: int) -> Link:
    """The link to the worker, when it comes. Raises HostError, NotBack, Aborted."""
    rank, limit_s = context.rank, context.job.return_timeout
    comes_again = context.board.deaths[rank] > 0
    began_s = time.monotonic()
    with context.board.waiting(AWAITS_ITS_WORKER):
        while True:
            event = next_event(mail, context.board)
            if isinstance(event, Joined):
                if event.link.peer.host == rank and event.link.peer.role == "worker":
                    return event.link
                event.link.end(f"this is the deputy of worker {rank}")
            elif event is not None:
                continue
            elif comes_again and time.monotonic() > began_s + limit_s:
                raise NotBack(
                    f"worker {rank} has not come within {limit_s:g} s",
                    why="nobody has started its process again, or it does not reach home",
                    fix="--return-timeout, PACELINE_RETURN_TIMEOUT: how long it is waited for",
                )
            elif not comes_again and not os.path.exists(f"/proc/{starter}"):
                raise HostError(f"worker {rank} has not come, and the process that was to start it has ended")


class _KeptElsewhere(Keeper):
    """What a script keeps that runs elsewhere. Its worker is asked for it."""

    def __init__(self, line: DeputyLine) -> None:
        super().__init__()
        self._line = line
        self.loaded: Callable[[], None] = lambda: None  # the worker's buffers may be others now; they have come

    def state(self, exchanges: Sequence[Kept], tensors: Tensors, *, random: bool = False) -> dict[str, Any]:
        shown = self._line.ask_worker(remote.Show(random))
        document, own = self._line.mail.take_packed("kept", shown.kept)
        tensors.update(own)
        return dict(document)

    def load(
        self, document: dict[str, Any], tensors: Tensors, exchanges: Sequence[Kept], *, random: bool = False
    ) -> None:
        self._line.ask_worker(remote.Keep(send_packed(self._line.link, "keep", document, tensors), random))
        self.loaded()
        for exchange, settings in zip(exchanges, document["settings"], strict=True):
            exchange.load_settings(unpack(settings, tensors))
