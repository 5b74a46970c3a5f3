"""The door: a port on which peers arrive, and strangers are kept off before they cost anything.

One thread meets everybody, with at most 64 connections that have not said who they are; each has 5 seconds and 64 KiB
for it. When more come the oldest is let go: so a flood of silent ones cannot keep a peer out, which says all it has to
say within milliseconds. What was refused is logged once, in words.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass

from paceline.errors import HostError
from paceline.protocol.link import Hello, Refused, Welcome, admit, mistaken
from paceline.protocol.refusals import Refusals
from paceline.transport import greeting, tls
from paceline.transport.ends import End
from paceline.transport.frame import FrameError
from paceline.transport.link import GREETING_S, Link

logger = logging.getLogger(__name__)

MAX_HALF_OPEN = 64
MAX_GREETING_BYTES = 64 * 1024
_BACKLOG = 256
_TCP_INFO_RECEIVED = struct.Struct("=128xQ")  # linux/tcp.h: tcpi_bytes_received


class _Refusal(Exception):
    """Why somebody stays outside; ``answer``: it is told, too."""

    def __init__(self, reason: str, *, answer: bool = False) -> None:
        super().__init__(reason)
        self.answer = answer


@dataclass
class _HalfOpen:
    sock: socket.socket
    address: str
    deadline_s: float
    meeting: Generator[int, None, Hello]


class Listener:
    """Owns the port and its thread; links that came through it go on when it is closed."""

    def __init__(
        self,
        end: End,
        host: str = "",
        port: int = 0,
        on_refused: Callable[[str], None] = logger.warning,
        *,
        shared: bool = False,
    ) -> None:
        """Listens from now on. Port 0: any that is free, see ``port``. ``shared``: at a port that is held (``hold``).
        Raises HostError.

        A link's first event is Joined. ``on_refused(line)`` is called once for each kind of refusal in ten seconds.
        """
        self._end = end
        self._on_refused = on_refused
        self._refusals = Refusals()
        self._links: dict[tuple[int, str], Link] = {}
        self._half_open: dict[int, _HalfOpen] = {}  # by descriptor, the oldest first
        self._sock = listening(host, port, shared=shared)
        self.port: int = self._sock.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ)
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"paceline-listen-{self.port}", daemon=True)
        self._thread.start()

    @property
    def refused(self) -> int:
        """How many connections have been refused so far."""
        return self._refusals.total

    def close(self) -> None:
        """Nobody comes in any more."""
        self._stopping.set()
        with suppress(OSError):  # it is closed already
            self._wake.send(b"!")
        self._thread.join(GREETING_S)

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                for key, _ in self._selector.select(self._next_deadline_s()):
                    if key.fileobj is self._sock:
                        self._accept()
                    elif key.fileobj is not self._woken and key.fd in self._half_open:
                        self._go_on(self._half_open[key.fd])
                now_s = self._end.clock()
                for late in [half for half in self._half_open.values() if half.deadline_s <= now_s]:
                    self._refuse(late, f"it has not said who it is within {GREETING_S:g} s")
        finally:
            for half in list(self._half_open.values()):
                self._forget(half)
                half.sock.close()
            self._selector.close()
            for sock in (self._sock, self._woken, self._wake):
                sock.close()

    def _next_deadline_s(self) -> float | None:
        first = next(iter(self._half_open.values()), None)
        return None if first is None else max(min(first.deadline_s - self._end.clock(), GREETING_S), 0.0)

    def _accept(self) -> None:
        try:
            sock, (host, port, *_) = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if self._half_open:
                    self._let_oldest_go("this process has no descriptor left")
                self._stopping.wait(0.1)  # the caller stays at the door: without this it would be asked for at once
            return  # or it has gone while it waited
        if len(self._half_open) >= MAX_HALF_OPEN:
            self._let_oldest_go(f"more than {MAX_HALF_OPEN} connections at once have not said who they are")
        sock.setblocking(False)
        if self._end.credentials is not None:
            try:
                sock = self._end.credentials.server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:  # it has gone already
                sock.close()
                return
        half = _HalfOpen(sock, f"{host}:{port}", self._end.clock() + GREETING_S, self._meet(sock))
        self._half_open[sock.fileno()] = half
        self._selector.register(sock, selectors.EVENT_READ)
        self._go_on(half)

    def _let_oldest_go(self, reason: str) -> None:
        self._refuse(next(iter(self._half_open.values())), reason)

    def _go_on(self, half: _HalfOpen) -> None:
        """One more part of a meeting, as far as it goes without waiting."""
        try:
            wanted = next(half.meeting)
            if _received_bytes(half.sock) > MAX_GREETING_BYTES:
                raise _Refusal(f"it has sent more than {MAX_GREETING_BYTES // 1024} KiB without saying who it is")
        except StopIteration as done:
            self._forget(half)
            self._let_in(half, done.value)
        except _Refusal as refusal:
            self._refuse(half, str(refusal), answer=refusal.answer)
        except (OSError, EOFError, FrameError, greeting.OtherVersion) as error:
            reason = tls.in_words(error) if isinstance(error, ssl.SSLError) else str(error)
            self._refuse(half, reason, answer=isinstance(error, greeting.OtherVersion))
        else:
            self._selector.modify(half.sock, wanted)

    def _meet(self, sock: socket.socket) -> Generator[int, None, Hello]:
        """The steps of a meeting; yields what to wait for."""
        if isinstance(sock, ssl.SSLSocket):
            while True:
                try:
                    sock.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    yield selectors.EVENT_READ
                except ssl.SSLWantWriteError:
                    yield selectors.EVENT_WRITE
        reading = greeting.reading()
        wanted = next(reading)
        while True:
            data = b""
            while len(data) < wanted:
                try:
                    part = sock.recv(wanted - len(data))
                except (BlockingIOError, ssl.SSLWantReadError):
                    yield selectors.EVENT_READ
                    continue
                if not part:
                    raise EOFError("it hung up before it had said who it is")
                data += part
            try:
                wanted = reading.send(data)
            except StopIteration as done:
                said = done.value
                break
        if not isinstance(said, Hello):
            raise _Refusal(f"it began with a {type(said).__name__}, not with a Hello")
        return said

    def _let_in(self, half: _HalfOpen, hello: Hello) -> None:
        place = (hello.peer.host, hello.peer.role)
        link = self._links.get(place)
        if link is not None and link.ended is not None:
            link = None
        reason = mistaken(hello) or admit(hello, self._end.job, link.known() if link else None)
        if reason is not None:
            self._refuse(half, reason, answer=True)
            return
        if link is None or link.session != hello.session:
            if link is not None:
                link.end(f"{hello.peer} has taken the place of {link.peer}")
            link = self._links[place] = Link(self._end, hello.peer, hello.session, dial=None)
        half.sock.settimeout(GREETING_S)
        try:
            half.sock.sendall(greeting.encode(Welcome(self._end.me, link.received())))
        except OSError:
            half.sock.close()  # it will come again
            return
        link.offer(half.sock, hello)

    def _refuse(self, half: _HalfOpen, reason: str, *, answer: bool = False) -> None:
        self._forget(half)
        line = self._refusals.told(self._end.clock(), half.address, reason)
        if line is not None:
            self._on_refused(line)
        with suppress(OSError):
            if answer:
                half.sock.settimeout(0.1)  # it fits the socket's buffer, and who does not take it has itself to blame
                half.sock.sendall(greeting.encode(Refused(reason[:1000])))
            # Closed with something unread, the answer (or an alert of TLS) would be swallowed by a reset.
            half.sock.setblocking(False)
            socket.socket.recv(half.sock, MAX_GREETING_BYTES)
        half.sock.close()

    def _forget(self, half: _HalfOpen) -> None:
        if self._half_open.pop(half.sock.fileno(), None) is not None:
            self._selector.unregister(half.sock)


def hold(host: str, port: int = 0) -> socket.socket:
    """Keeps a port (0: any that is free) for processes of this user that listen there by and by. Raises HostError."""
    try:
        if port:
            socket.create_server((host, port), family=_family(host, port)).close()  # is it somebody else's?
        with contextlib.ExitStack() as opened:
            sock = opened.enter_context(socket.socket(_family(host, port), socket.SOCK_STREAM))
            # Whoever binds there must say the same, and be the same user. Nobody is let in before somebody listens.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port))
            opened.pop_all()
            return sock
    except OSError as error:
        raise _not_there(error, host, port) from None


def listening(host: str, port: int, *, shared: bool = False) -> socket.socket:
    try:
        # An empty host is every address, of both families where the kernel has both.
        if host:
            family = _family(host, port)
            return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        raise _not_there(error, host, port) from None


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]


def _not_there(error: OSError, host: str, port: int) -> HostError:
    where = f"{host or 'any address'} port {port}"
    if error.errno == errno.EADDRINUSE:
        return HostError(
            f"{where} is in use",
            why="another program listens there, or another run of yours",
            fix="use another port, or port 0 for any that is free",
        )
    if error.errno in (errno.EADDRNOTAVAIL,) or isinstance(error, socket.gaierror):
        return HostError(
            f"this machine has no address {host!r}", fix="give an address of an interface, or none for all of them"
        )
    return HostError(f"cannot listen at {where}: {error.strerror or error}")


def _received_bytes(sock: socket.socket) -> int:
    """All that the kernel has received of this connection, read by us or not; 0 where it does not tell."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_RECEIVED.size)
    return int(_TCP_INFO_RECEIVED.unpack(info)[0]) if len(info) == _TCP_INFO_RECEIVED.size else 0
