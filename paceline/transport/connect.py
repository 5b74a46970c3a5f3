"""The side that connects: how it finds the other one, says who it is, and tries again."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack

import msgspec

from paceline.errors import HostError
from paceline.protocol.link import SESSION_BYTES, Hello, Peer, Refused, SessionLost, Welcome
from paceline.transport import greeting, tls
from paceline.transport.ends import End
from paceline.transport.frame import FrameError
from paceline.transport.lane import prepare
from paceline.transport.link import DOWN, GREETING_S, UP, Connection, Link, NotWanted


def connect(end: End, address: tuple[str, int], timeout_s: float = 60.0) -> Link:
    """A link to whoever listens at ``address``: returns when both have met. Raises HostError, with the reason.

    It is tried again and again until then, so that it does not matter who of the two is started first; what would not
    change (another key, another version) is told at once.
    """
    session = secrets.token_bytes(SESSION_BYTES)
    attempt = 0

    def dial(link: Link, received: int) -> Connection:
        nonlocal attempt
        attempt += 1
        return _dial(link, end, address, Hello(end.job, end.me, session, attempt, UP, received, link.joined.is_set()))

    link = Link(end, Peer(-1, "unknown"), session, dial)
    if not link.joined.wait(timeout_s):
        link.end(f"no connection within {timeout_s:g} s: {link.why_not}")
        link.joined.wait(GREETING_S)
    if link.ended is not None:
        where = f"{address[0]}:{address[1]}"
        raise HostError(f"no link to {where}: {link.ended}", fix="paceline doctor --peer " + where)
    return link


def _dial(link: Link, end: End, address: tuple[str, int], hello: Hello) -> Connection:
    socks: list[socket.socket] = []
    welcomes: list[Welcome] = []
    with ExitStack() as opened:
        for lane in (UP, DOWN):
            sock = opened.enter_context(socket.create_connection(address, GREETING_S))
            prepare(sock, GREETING_S, end.patience.silence_s)
            if end.credentials is not None:
                sock = opened.enter_context(end.credentials.client.wrap_socket(sock, server_hostname=tls.NAME))
            socks.append(sock)
            welcomes.append(_greet(sock, msgspec.structs.replace(hello, lane=lane)))
        peer = welcomes[0].peer
        if link.joined.is_set() and peer != link.peer:
            raise SessionLost(f"{link.peer} is not there any more; {peer} answers")
        link.peer = peer
        opened.pop_all()
        return link.connection(socks[UP], socks[DOWN], welcomes[UP].received)


def _greet(sock: socket.socket, hello: Hello) -> Welcome:
    sock.sendall(greeting.encode(hello))
    reading = greeting.reading()
    wanted = next(reading)
    while True:
        data = b""
        while len(data) < wanted:
            part = sock.recv(wanted - len(data))
            if not part:
                raise EOFError("it hung up before it had said who it is")
            data += part
        try:
            wanted = reading.send(data)
        except StopIteration as done:
            answer = done.value
            break
    if isinstance(answer, Refused):
        raise NotWanted(answer.reason)
    if not isinstance(answer, Welcome):
        raise FrameError(f"it answered with a {type(answer).__name__}")
    return answer
