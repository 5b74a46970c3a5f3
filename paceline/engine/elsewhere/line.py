"""A worker elsewhere's end of its link to home: what comes, and what the link's end means for the process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

import torch

from paceline.engine.elsewhere.mail import Mail, send, send_document
from paceline.protocol import remote
from paceline.transport.ends import Ended, Event, LinkEnded, Received
from paceline.transport.link import Link

# By the deputy, of a worker that waits for an answer.
Asked: TypeAlias = remote.Show | remote.Keep | remote.Fill | remote.SendFold | remote.SendOwn | remote.Close
STOPPED = 75  # the exit status of a worker that was told to stop, or has lost home
_GRACE_S = 2.0  # for the script to come to its next call


class NotLetIn(Exception):
    """The link has ended before this process was anybody: whoever had its place before was not gone yet."""


class Line:
    """This process's end of the link: what comes, and what its end means. ``sink`` is called by the link's thread."""

    def __init__(self, rank: int) -> None:
        self._rank, self.mail, self.is_over = rank, Mail(), False
        self.is_in = False  # has home said who this is?
        self.is_leaving = False  # the next answer is the last
        self.asks = False  # does the script wait for home?
        self.is_ending = False  # has this process been told to stop, or lost home?
        self._said = threading.Lock()

    def sink(self, event: Event) -> None:
        """Tell of the end at once, and end a process that does not come to hear it."""
        is_stop = isinstance(event, Received) and isinstance(event.message, remote.Stop)
        if self.is_leaving and isinstance(event, Received) and isinstance(event.message, remote.Answer):
            self.is_over = True  # the deputy hangs up now
        if not self.is_over and (is_stop or (self.is_in and isinstance(event, Ended))):
            self._tell(event)
        self.mail.put(event)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Sending, within it, ends the process if home is lost."""
        try:
            yield
        except LinkEnded as lost:
            self._lost(str(lost))

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within it the script waits for home."""
        before, self.asks = self.asks, True
        try:
            yield
        finally:
            self.asks = before

    def put(self, link: Link, what: str, tensor: torch.Tensor) -> None:
        with self.kept():
            send(link, what, tensor)

    def put_document(self, link: Link, prefix: str, value: Any) -> Any:
        with self.kept():
            return send_document(link, prefix, value)

    def answer(self, heed: Callable[[Asked], None]) -> remote.Answer:
        """The next. ``heed`` is called for what the deputy asks before."""
        while True:
            match self.mail.events.get():
                case Received(message=remote.Answer() as answer):
                    return answer
                case Received(
                    message=remote.Show()
                    | remote.Keep()
                    | remote.Fill()
                    | remote.SendFold()
                    | remote.SendOwn()
                    | remote.Close() as asked
                ):
                    heed(asked)
                case Received(message=remote.Stop(reason=reason)):
                    self.give_up(reason)
                case Ended(reason=reason):
                    self._lost(reason)

    def _lost(self, reason: str) -> NoReturn:
        if not self.is_in:
            raise NotLetIn(reason)
        self.give_up(reason)

    def give_up(self, reason: str) -> NoReturn:
        """Raises SystemExit. Why has been told already, or is on its way."""
        self._say(f"home is lost: {reason}")
        self.is_over = True
        raise SystemExit(STOPPED)

    def _tell(self, event: Event) -> None:
        self.is_ending = True
        if isinstance(event, Received):
            self._say(f"told to stop: {event.message.reason}")
        elif isinstance(event, Ended):
            self._say(f"home is lost: {event.reason}")
        watch = threading.Timer(_GRACE_S, self._end_by_force)
        watch.daemon = True
        watch.start()

    def _say(self, text: str) -> None:
        if self._said.acquire(blocking=False):  # once
            sys.stderr.write(f"paceline: worker {self._rank} ends: {text}\n")
            sys.stderr.flush()

    def _end_by_force(self) -> None:
        if not self.is_over:
            os._exit(STOPPED)
