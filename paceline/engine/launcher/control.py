"""The way into a run that is going on: a Unix socket in its directory, for its own user.

    question: a message of protocol/messages.py (Scale; or Failed, of a server that cannot be started)
    answer: another (Scaled)

Whoever connects may ask as often as it likes, and is answered in turn.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.errors import HostError, UsageError
from paceline.protocol import messages
from paceline.transport.channel import Channel, Closed
from paceline.transport.frame import FrameError

NAME = "control"
_PEER = struct.Struct("3i")
_PATIENCE_S = 30.0


class Control:
    """The launcher's end, in a run's ``directory``. Raises HostError if there can be no socket."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        try:
            (directory / NAME).unlink(missing_ok=True)  # of the run that is gone on with
            with _short(directory) as path:
                self._listener.bind(path)
            os.chmod(directory / NAME, 0o600)
            self._listener.listen()
        except OSError as error:
            raise HostError(f"no socket can be made in {directory}: {error.strerror}") from None
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def turn(self, answer: Callable[[messages.Any], messages.Any]) -> None:
        """Answer what has been asked since; does not wait for anybody."""
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
                continue
            channel: Channel = key.data
            try:
                for message, _ in channel.drain():
                    channel.send(answer(message))
            except (Closed, FrameError, OSError):
                self._drop(channel)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._drop(key.data)
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            (self._directory / NAME).unlink()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if user not in (os.getuid(), 0):
                connection.close()
                return
            connection.settimeout(_PATIENCE_S)  # for one who asks and does not read the answers
            channel = Channel(connection)
            self._selector.register(channel, selectors.EVENT_READ, channel)

    def _drop(self, channel: Channel) -> None:
        self._selector.unregister(channel)
        channel.close()


def ask(directory: Path, question: messages.Any) -> messages.Any:
    """The answer of the run in ``directory``. Raises UsageError if nobody is there, HostError if nothing comes."""
    over = UsageError(f"run {directory.name!r} is not going on", fix="paceline runs list shows what became of it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE_S)
        try:
            with _short(directory) as path:
                sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise over from None
        except OSError as error:
            raise HostError(f"run {directory.name!r} cannot be reached: {error.strerror or error}") from None
        channel = Channel(sock)
        try:
            channel.send(question)
            return channel.receive()[0]
        except Closed:
            raise over from None
        except (OSError, FrameError) as error:
            raise HostError(f"run {directory.name!r} does not answer: {error}") from None


@contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A path of the socket that is short: the kernel takes 107 bytes at most."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)
