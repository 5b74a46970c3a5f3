"""A deputy's end of its link: what its worker says, one thing at a time, and what it means that the worker is lost."""

from __future__ import annotations

import os
import queue
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from paceline.engine.context import Context
from paceline.engine.elsewhere.line import Asked
from paceline.engine.elsewhere.mail import Mail
from paceline.errors import ConfigError, WorkersLost
from paceline.protocol import messages, remote
from paceline.transport.board import AWAITS_ITS_WORKER, Aborted, Board
from paceline.transport.channel import Closed
from paceline.transport.ends import Ended, Event, Joined, LinkEnded, Received
from paceline.transport.link import Link

_LOOK_S = 0.1  # how often a deputy that waits for its worker looks whether the run is being stopped
_LAST_WORD_S = 1.0
_KILLED_S = 1.0  # a process that is killed is gone by then

_Said = TypeVar("_Said", remote.Ask, remote.Shown)


def next_event(mail: Mail, board: Board) -> Event | None:
    """The next event of a deputy's links; None if there is none for a moment. Raises Aborted."""
    try:
        return mail.events.get(timeout=_LOOK_S)
    except queue.Empty:
        if board.abort:
            raise Aborted("the run is being stopped") from None
        return None


def tell_starter(descriptor: int, who: str, what: str) -> None:
    """To whoever starts workers and servers elsewhere: this one's deputy waits for it, say."""
    with suppress(BrokenPipeError):  # it may have ended since
        os.write(descriptor, f"{who} {what}\n".encode())


def say_stop(context: Context, link: Link, reason: str) -> None:
    """Tell who is elsewhere why all ends, in the launcher's words if it has said some."""
    poll = select.poll()
    with suppress(Closed, OSError, ValueError):
        poll.register(context.channel, select.POLLIN)
        if poll.poll(_LAST_WORD_S * 1000):
            for message, _ in context.channel.drain():
                reason = message.reason if isinstance(message, messages.Stop) else reason
    with suppress(LinkEnded, TimeoutError):
        link.send(remote.Stop(reason), timeout_s=_LAST_WORD_S)
        link.flush(_LAST_WORD_S)


class DeputyLine:
    """The end of ``link`` whose worker is ``rank``. All that it does raises WorkersLost when the worker is given up."""

    def __init__(
        self, rank: int, board: Board, link: Link, mail: Mail, hang_s: float, terminated: Callable[[], None]
    ) -> None:
        """``hang_s``: so long the worker may stand still while others wait for it. ``terminated``: it is to end."""
        self.link, self.mail = link, mail
        self.rank, self._board, self._hang_s, self._terminated = rank, board, hang_s, terminated
        self._process = -1  # the worker's, as a descriptor, if it is on this host
        self.maps_home = False  # has the worker memory of home's in use?

    def knows_process(self, pid: int) -> None:
        """The worker is this process of this host."""
        with suppress(ProcessLookupError):
            self._process = os.pidfd_open(pid)

    def next_ask(self) -> remote.Ask:
        """What the worker wants done next. Raises Aborted."""
        return self._next(remote.Ask)

    def ask_worker(self, asked: Asked) -> remote.Shown:
        """While the worker waits for an answer: its script stands still. Raises Aborted, and what it could not do."""
        with self.kept():
            self.link.send(asked)
        shown = self._next(remote.Shown)
        if shown.failure is not None:
            raise ConfigError(shown.failure.what, why=shown.failure.why, fix=shown.failure.fix)
        return shown

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Sending, within it, gives the worker up if the link has ended."""
        try:
            yield
        except LinkEnded as lost:
            raise self._lost(str(lost)) from None

    def flush(self) -> None:
        """Until the worker's process has all that was sent to it."""
        with self._board.waiting(AWAITS_ITS_WORKER), self.kept():
            self.link.flush()

    def _next(self, kind: type[_Said]) -> _Said:
        """The next that the worker says of this kind."""
        with self._board.waiting(AWAITS_ITS_WORKER):  # it is the worker that computes
            while True:
                match next_event(self.mail, self._board):
                    case Received(link=link, message=said) if link is self.link and isinstance(said, kind):
                        return said
                    case Received(link=link, message=remote.Printed(data=data)) if link is self.link:
                        os.write(1, data)  # its log
                    case Received(link=link, message=remote.Still(seconds=still_s)) if link is self.link:
                        if still_s >= self._hang_s and self._board.is_awaited(self.rank):
                            raise self._lost(f"it has done nothing for {still_s:.0f} s while others wait for it")
                    case Received(link=link, message=remote.Terminated()) if link is self.link:
                        self._terminated()
                    case Ended(link=link, reason=reason) if link is self.link:
                        raise self._lost(reason)
                    case Joined(link=link) if link is not self.link:
                        # It comes again, to the deputy after this one: that is a newcomer's.
                        raise self._lost("another process has come in its place")

    def _lost(self, reason: str) -> WorkersLost:
        """The worker is given up. One that maps this memory is killed first: it may be stopped, and write later."""
        if self._process >= 0 and self.maps_home:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            select.select([self._process], [], [], _KILLED_S)
        return WorkersLost(
            f"worker {self.rank} is lost: {reason}",
            why="its process has ended, its host is down, or the network between is cut",
        )
