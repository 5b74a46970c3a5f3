"""The launcher's channels: to the front, and to every process that was forked for it."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Iterable, Iterator, Sequence

from paceline.engine.launcher.diary import Entry
from paceline.engine.launcher.watch import Whose
from paceline.protocol import messages
from paceline.transport.channel import Channel, Closed, Peeked
from paceline.transport.frame import split

ZYGOTE: Whose = ("zygote", 0)


class Channels:
    """By role and rank. ``silent``: nothing is sent, since it was sent before."""

    def __init__(self, front: Channel) -> None:
        self._channels: dict[Whose, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(front, selectors.EVENT_READ, ("front", 0))
        self.silent = False

    def open(self, whose: Whose, fd: int) -> None:
        """``fd`` is the launcher's end of the process's channel, and the channel's from now on."""
        channel = self._channels[whose] = Channel(socket.socket(fileno=fd))
        self._selector.register(channel, selectors.EVENT_READ, whose)

    def open_those(self, alive: Iterable[Whose], held: dict[Whose, int]) -> None:
        """Take from ``held`` the ends of those who are alive."""
        for whose in alive:
            if whose in held and whose not in self._channels:
                self.open(whose, held.pop(whose))

    def close(self, whose: Whose) -> None:
        """If there is one."""
        channel = self._channels.pop(whose, None)
        if channel is not None:
            self._selector.unregister(channel)
            channel.close()

    def ready(self, wait_s: float) -> Iterator[Whose]:
        """Whose have something to read, or have become so within ``wait_s``; not what is closed meanwhile."""
        for key, _ in self._selector.select(wait_s):
            if key.data[0] == "front" or self._channels.get(key.data) is key.fileobj:
                yield key.data

    def peek(self, whose: Whose) -> list[Peeked]:
        """What there is to read; it stays there until it is consumed. A channel that has ended is closed."""
        channel = self._channels.get(whose)
        if channel is None:
            return []
        try:
            return channel.peek()
        except Closed:
            self.close(whose)
            return []

    def consume(self, whose: Whose, peeked: Sequence[Peeked]) -> None:
        """Take what was peeked, if its channel is still there."""
        if whose in self._channels:
            self._channels[whose].consume(sum(one.size_bytes for one in peeked))

    def still_there(self, entry: Entry) -> list[Peeked]:
        """The messages of an entry of the diary, if they are still to be read."""
        frames = split(entry.frames)
        channel = self._channels.get((entry.role, entry.rank))
        try:
            peeked = channel.peek() if channel is not None else []
        except Closed:
            return []
        if [one.frame for one in peeked[: len(frames)]] != frames:
            forget(peeked)
            return []
        forget(peeked[len(frames) :])
        return peeked[: len(frames)]

    def send(self, whose: Whose, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        """To a process that may have ended: its end is reported by the zygote, with the reason."""
        channel = None if self.silent else self._channels.get(whose)
        if channel is not None:
            with contextlib.suppress(Closed):
                channel.send(message, descriptors)

    def send_all(self, roles: Sequence[str], message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        for role in roles:
            for whose in self._channels:
                if whose[0] == role:
                    self.send(whose, message, descriptors)


def forget(peeked: Sequence[Peeked]) -> None:
    """They stay in their socket; the copies of their descriptors go."""
    for one in peeked:
        for fd in one.descriptors:
            os.close(fd)
