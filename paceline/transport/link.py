"""A link: a session with one peer over TCP, which outlives its connections. The laws are in ``protocol/link.py``.

    caller -> send() -> window -> writing thread -> out lane ~~> in lane -> reading thread -> place(), sink()
                  |       ^                          ^                            |
                  |       +------------------- acknowledgements <-----------------+
                  +----- what is small, and finds nothing before it -----+

One side connects (``connect.py``), the other listens (``listener.py``); from then on both are alike. If a connection
breaks, or the peer is silent, the one that connected tries again, and what was not acknowledged is written again, the
same bytes: so a payload must not be changed before its ``Sent`` is ``done``. Each link has two threads of its own; what
the kernel takes at once is written by who sends it, since to wake a thread for it takes longer than to write it.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from paceline.protocol.link import (
    Hello,
    Incoming,
    Known,
    LinkBroken,
    Outgoing,
    Peer,
    Pulse,
    Senseless,
    SessionLost,
    retry_in_s,
)
from paceline.transport import greeting, tls, wire
from paceline.transport.ends import Back, End, Ended, Joined, LinkEnded, Lost, Received
from paceline.transport.frame import FrameError
from paceline.transport.lane import AT_ONCE_BYTES, InLane, OutLane, prepare

logger = logging.getLogger(__name__)

GREETING_S = 5.0  # within so long two processes have met, or the connection is let go
UP, DOWN = 0, 1  # lanes, seen from the one that connected
_CLOSED = "this side has closed the link"
_SCRATCH_BYTES = 256 * 1024

_encoder = msgspec.msgpack.Encoder()


class Sent:
    """A message on its way. Its payload belongs to the link until it is ``done``."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self.number = link, number

    @property
    def done(self) -> bool:
        """Has the peer acknowledged it? It has it whole, then, and its application will be told."""
        return self._link.acknowledged >= self.number

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it is done. Raises LinkEnded, TimeoutError."""
        self._link.wait_for(self.number, timeout_s)


@dataclass(slots=True)
class _Frame:
    body: bytes
    payload: memoryview | None


@dataclass(slots=True)
class _Work:
    """What is to be written now. ``frame``: of a MESSAGE."""

    connection: Connection
    kind: int
    flags: int
    number: int
    acknowledged: int
    frame: _Frame | None


_NOTHING = _Frame(b"", None)


class Connection:
    """Both lanes of one attempt."""

    def __init__(self, out: OutLane, into: InLane, peer_received: int) -> None:
        self.out, self.into, self.peer_received = out, into, peer_received

    def hang_up(self) -> None:
        self.out.hang_up()
        self.into.hang_up()

    def close(self) -> None:
        self.hang_up()
        self.out.close()
        self.into.close()


class NotWanted(Exception):
    """The peer does not want this process; asking again will not change it."""


class _PeerLeft(Exception):
    """The peer has said goodbye."""


class Link:
    """Made by ``connect.py`` or ``listener.py``. All methods may be called by any thread."""

    def __init__(self, end: End, peer: Peer, session: bytes, dial: Callable[[Link, int], Connection] | None) -> None:
        self._end, self.peer, self.session, self._dial = end, peer, session, dial
        patience = end.patience
        self._changed = threading.Condition()
        self._outgoing: Outgoing[_Frame] = Outgoing(patience.window_bytes, patience.window_messages)
        self._incoming = Incoming()
        self._pulse = Pulse(patience, end.clock())
        self._connection: Connection | None = None
        self._offered: dict[int, tuple[int, socket.socket]] = {}  # lane: attempt, socket
        self._pending: Connection | None = None  # offered whole, not yet taken up
        self._why_cut = ""
        self.why_not = "nobody answered"  # the last attempt to connect failed
        self._ended: str | None = None
        self._asked = False  # acknowledgement wanted: somebody waits for it
        self._answer = False  # the peer wants one
        self._closing = self._leaving = self._bye = False
        self._writing: _Work | None = None  # what a thread has in hand
        self.peer_left = False  # in order: all that it has sent is here
        self.joined = threading.Event()  # or ended
        self._decoder = msgspec.msgpack.Decoder(end.messages)
        self._scratch: memoryview | None = None
        self._summed = end.credentials is None
        self._threads = [
            threading.Thread(target=work, name=f"paceline-{name}-{session.hex()[:6]}", daemon=True)
            for name, work in (("read", self._read_forever), ("write", self._write_forever))
        ]
        for thread in self._threads:
            thread.start()

    # For the application.

    def send(self, message: Any, payload: Any = None, timeout_s: float | None = None) -> Sent:
        """Sends ``message`` and the bytes of ``payload`` (contiguous, not copied); returns before they are there.

        Waits while the window is full. At most ``wire.MAX_PAYLOAD`` bytes; 1 to 4 MB are best. Raises LinkEnded,
        TimeoutError, FrameError for what is too large.
        """
        view = None if payload is None else memoryview(payload).cast("B")
        frame = _Frame(_encoder.encode(message), view if view else None)
        size = len(frame.body) + (len(view) if view else 0)
        wire.check_sizes(len(frame.body), size - len(frame.body))
        with self._changed:
            if not self._outgoing.has_room(size) and not self._changed.wait_for(
                lambda: self._ended is not None or self._closing or self._outgoing.has_room(size), timeout_s
            ):
                raise TimeoutError(f"{self.peer} does not take what is sent to it")
            if self._ended is not None or self._closing:
                raise LinkEnded(self._ended or "this side is closing the link")
            number = self._outgoing.add(frame, size)
            work = self._work_at_once(size)
            if work is None:
                self._changed.notify_all()
        if work is not None:
            self._write(work)
        return Sent(self, number)

    def _work_at_once(self, size_bytes: int) -> _Work | None:
        """The message that was just added, if the thread that sends it can write it without waiting."""
        connection = self._connection
        if (
            connection is None
            or self._writing is not None
            or size_bytes > AT_ONCE_BYTES
            or not self._outgoing.is_next_last
        ):
            return None
        return self._choose(connection) if connection.out.takes_at_once(size_bytes) else None

    @property
    def acknowledged(self) -> int:
        return self._outgoing.acknowledged

    @property
    def made_by(self) -> End:
        """As which end of links this process has made it."""
        return self._end

    @property
    def own_address(self) -> str:
        """Of this host, as the peer reaches it. Raises LinkEnded where there is no connection now."""
        connection = self._connection
        if connection is None:
            raise LinkEnded(self._ended or f"no connection to {self.peer}")
        return connection.out.own_address

    @property
    def ended(self) -> str | None:
        """Why, if the session is over."""
        return self._ended

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def flush(self, timeout_s: float | None = None) -> None:
        """Until the peer has all that was sent. Raises LinkEnded, TimeoutError."""
        self.wait_for(self._outgoing.last, timeout_s)

    def wait_for(self, number: int, timeout_s: float | None = None) -> None:
        """Until the peer has acknowledged this message. Raises LinkEnded, TimeoutError."""
        with self._changed:
            if self._outgoing.acknowledged < number:
                self._asked = True
                self._changed.notify_all()
            if not self._changed.wait_for(
                lambda: self._outgoing.acknowledged >= number or self._ended is not None, timeout_s
            ):
                raise TimeoutError(f"{self.peer} has not acknowledged message {number}")
            if self._outgoing.acknowledged < number:
                raise LinkEnded(self._ended)

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits until all is acknowledged, says goodbye, ends both threads. The peer's event is Ended too."""
        with self._changed:
            if self._ended is None:
                self._closing = True
                self._asked = True
                self._changed.notify_all()
                self._changed.wait_for(self._has_left, timeout_s)
        self.end(_CLOSED)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _has_left(self) -> bool:
        nobody_to_tell = self._connection is None and self._outgoing.acknowledged == self._outgoing.last
        return self._bye or self._ended is not None or (nobody_to_tell and not self._leaving)

    def end(self, reason: str) -> None:
        """At once; what was not acknowledged may not arrive."""
        with self._changed:
            self._ended = self._ended or reason
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            connection.hang_up()

    # For the listener.

    def known(self) -> Known:
        return Known(self.session, self.peer)

    def received(self) -> int:
        return self._incoming.received

    def offer(self, sock: socket.socket, hello: Hello) -> None:
        """One of the two connections of an attempt; the second one takes the place of what there was."""
        with self._changed:
            closed = [self._offered.pop(hello.lane)[1]] if hello.lane in self._offered else []
            self._offered[hello.lane] = (hello.attempt, sock)
            whole = None
            if self._ended is not None:
                closed += self._drop_offers()
            elif len({attempt for attempt, _ in self._offered.values()}) == 1 and len(self._offered) == 2:
                (_, up), (_, down) = self._offered.pop(UP), self._offered.pop(DOWN)
                whole = self.connection(down, up, hello.received)
                superseded, self._pending = self._pending, whole
                current = self._connection
                self._changed.notify_all()
        for old in closed:
            old.close()
        if whole is not None:
            if superseded is not None:
                superseded.close()
            if current is not None:
                self._cut(current, "the peer has connected anew")

    def _drop_offers(self) -> list[socket.socket]:
        dropped = [sock for _, sock in self._offered.values()]
        self._offered = {}
        return dropped

    def connection(self, out: socket.socket, into: socket.socket, peer_received: int) -> Connection:
        patience = self._end.patience
        prepare(out, patience.silence_s, patience.silence_s)
        prepare(into, patience.heartbeat_s, patience.silence_s)
        return Connection(OutLane(out, self._end.turns), InLane(into, self._on_bytes, self._on_wait), peer_received)

    # The reading thread. It alone tells of events, so that they come in order.

    def _read_forever(self) -> None:
        try:
            reason = self._read_sessions()
        except Exception as error:  # the outermost line of a thread
            logger.exception("the link to %s", self.peer)
            reason = f"an error on this side: {type(error).__name__}: {error}"
        with self._changed:
            self._ended = self._ended or reason
            left = [lane for lane in (self._connection, self._pending) if lane is not None]
            self._connection = self._pending = None
            dropped = self._drop_offers()
            self._changed.notify_all()
        for connection in left:
            connection.close()
        for sock in dropped:
            sock.close()
        self._end.sink(Ended(self, self._ended))
        self.joined.set()

    def _read_sessions(self) -> str:
        """Reads from one connection after the other, until the end; returns why."""
        was_up = False
        while True:
            try:
                connection = self._next_connection()
                if connection is None:
                    return self._ended or f"no connection to {self.peer} for {self._end.patience.give_up_s:g} s"
                try:
                    is_taken = self._take_up(connection)
                except SessionLost:
                    connection.close()
                    raise
                if not is_taken:
                    connection.close()
                    return self._ended or ""
                self._end.sink(Back(self) if was_up else Joined(self))
                self.joined.set()
                was_up = True
                why = self._read_connection(connection)
            except (SessionLost, Senseless, _PeerLeft, greeting.OtherVersion, NotWanted) as end:
                return str(end)
            with self._changed:
                if self._ended is not None or self._leaving:
                    return self._ended or _CLOSED
            self._end.sink(Lost(self, why))

    def _read_connection(self, connection: Connection) -> str:
        """Until it breaks; returns why, and leaves it closed."""
        why = ""
        try:
            while True:
                self._read_frame(connection.into.stream)
        except (OSError, EOFError, FrameError, LinkBroken, _Silent) as error:
            why = _in_words(error)
        finally:
            with self._changed:
                if self._connection is connection:
                    self._connection = None
                else:
                    why = self._why_cut or why  # another thread has cut it, and knows better
                self._why_cut = ""
            connection.close()
        return why

    def _read_frame(self, stream: wire.Stream) -> None:
        header = wire.decode_header(stream.take(wire.HEADER_BYTES))
        received = self._read_message(stream, header) if header.kind == wire.MESSAGE else None
        with self._changed:
            self._acknowledge(header)
            # Before the application is told: what it answers at once carries the acknowledgement.
            if received is not None:
                self._incoming.take(header.number, header.body_bytes + header.payload_bytes)
            elif header.kind == wire.MESSAGE:
                self._incoming.repeated()
            patience = self._end.patience
            self._answer = (
                self._answer
                or bool(header.flags & wire.ANSWER)
                or self._incoming.owes_much(patience.window_bytes // 4, patience.window_messages // 4)
            )
            if self._answer:
                self._changed.notify_all()
        if received is not None:
            self._end.sink(received)
        if header.kind == wire.BYE:
            self.peer_left = True
            raise _PeerLeft(f"{self.peer} has closed the link")

    def _acknowledge(self, header: wire.Header) -> None:
        if self._outgoing.acknowledge(header.acknowledged):
            self._changed.notify_all()

    def _read_message(self, stream: wire.Stream, header: wire.Header) -> Received | None:
        """None for one that has come before."""
        body = stream.take(header.body_bytes)
        wire.check_body(header, body)
        if not self._incoming.is_new(header.number):
            self._skip(stream, header.payload_bytes)
            return None
        try:
            message = wire.decode_body(self._decoder, body)
        except FrameError as error:  # the bytes are what was sent: the peer means it
            raise Senseless(f"{self.peer} sent what is no message here: {error}") from None
        payload = None
        if header.payload_bytes:
            payload = self._placed(message, header.payload_bytes)
            stream.take_into(payload)
            if header.flags & wire.SUMMED:
                wire.check_payload(header, wire.summed(payload))
        return Received(self, message, payload)

    def _placed(self, message: Any, size_bytes: int) -> memoryview:
        view = self._end.place(self, message, size_bytes)
        if view is None:
            raise Senseless(f"{self.peer} sent {size_bytes} bytes with a {type(message).__name__}; none are expected")
        view = memoryview(view).cast("B")
        if len(view) != size_bytes:
            raise Senseless(
                f"{self.peer} sent {size_bytes} bytes with a {type(message).__name__}; {len(view)} are expected"
            )
        return view

    def _skip(self, stream: wire.Stream, size_bytes: int) -> None:
        """Reads a payload that is here already."""
        self._scratch = self._scratch or memoryview(bytearray(_SCRATCH_BYTES))
        while size_bytes:
            part = self._scratch[: min(size_bytes, _SCRATCH_BYTES)]
            stream.take_into(part)
            size_bytes -= len(part)

    def _on_bytes(self) -> None:
        self._pulse.heard(self._end.clock())

    def _on_wait(self) -> None:
        if (silent_s := self._pulse.silent_s(self._end.clock())) is not None:
            raise _Silent(f"{self.peer} silent {silent_s:.1f} s")

    def _next_connection(self) -> Connection | None:
        """The next one, or None when there will be none. Raises SessionLost, OtherVersion, NotWanted."""
        began_s, attempts = self._end.clock(), 0
        # How long a first connection may take is for the caller to say (connect.py).
        is_first = self._dial is not None and not self.joined.is_set()
        give_up_s = math.inf if is_first else self._end.patience.give_up_s
        while True:
            left_s = began_s + give_up_s - self._end.clock()
            with self._changed:
                if self._ended is not None or left_s <= 0:
                    return None
                if self._pending is not None:
                    connection, self._pending = self._pending, None
                    return connection
                if self._dial is None:
                    self._changed.wait(min(left_s, self._end.patience.heartbeat_s))
                    continue
                attempts += 1
                self._changed.wait_for(lambda: self._ended is not None, retry_in_s(attempts, random.random()))
                if self._ended is not None:
                    return None
            try:
                return self._dial(self, self._incoming.received)
            except (OSError, EOFError, FrameError) as error:
                self.why_not = _in_words(error)
                if not self.joined.is_set() and _is_final(error):
                    raise NotWanted(self.why_not) from None

    def _take_up(self, connection: Connection) -> bool:
        with self._changed:
            if self._ended is not None:
                return False
            self._outgoing.resume(connection.peer_received)
            self._incoming.resume()
            self._pulse = Pulse(self._end.patience, self._end.clock())
            self._writing = None  # nobody has anything in hand for this one
            self._connection = connection
            self._changed.notify_all()
            return True

    def _cut(self, connection: Connection, why: str) -> None:
        """Any thread: this connection is of no use."""
        with self._changed:
            if self._connection is connection:
                self._connection, self._why_cut = None, why
        connection.hang_up()

    # Writing: one thread at a time.

    def _write_forever(self) -> None:
        while (work := self._next_work()) is not None:
            self._write(work)

    def _next_work(self) -> _Work | None:
        """Waits for something to write; None at the end."""
        with self._changed:
            while True:
                if self._ended is not None or self._bye:
                    return None
                if self._connection is None:
                    self._changed.wait()
                elif self._writing is not None:
                    self._changed.wait(self._end.patience.heartbeat_s)
                elif (work := self._choose(self._connection)) is not None:
                    return work
                else:
                    self._changed.wait(self._pulse.due_in_s(self._end.clock()))

    def _choose(self, connection: Connection) -> _Work | None:
        """What is to be written there now, if anything; whoever asks writes it."""
        now_s, frame, number = self._end.clock(), None, 0
        if self._outgoing.has_next:
            found = self._outgoing.next()
            assert found is not None
            kind, (number, frame) = wire.MESSAGE, found
        elif self._closing and self._outgoing.acknowledged == self._outgoing.last:
            kind = wire.BYE
            self._leaving = True
        elif self._asked or self._answer or self._pulse.due_in_s(now_s) <= 0:
            kind = wire.PULSE
        else:
            return None
        # Who waits, waits for the last one; what is before it is acknowledged with it.
        flags = wire.ANSWER if self._asked and not self._outgoing.has_next else 0
        self._asked = self._asked and not flags
        self._answer = False
        self._pulse.said(now_s)
        self._writing = _Work(connection, kind, flags, number, self._incoming.tell(), frame)
        return self._writing

    def _write(self, work: _Work) -> None:
        try:
            if work.kind == wire.BYE:
                self._goodbye(work.connection, work.acknowledged)
            else:
                self._write_frame(work)
        except TimeoutError:
            self._cut(work.connection, f"{self.peer} has taken nothing for {self._end.patience.silence_s:g} s")
        except OSError as error:
            self._cut(work.connection, _in_words(error))
        except BaseException:  # Ctrl-C in the thread that sends: half a frame may be on its way, so all goes again
            self._cut(work.connection, "interrupted in the midst of writing")
            raise
        finally:
            with self._changed:
                if self._writing is work:
                    self._writing = None
                if self._outgoing.has_next or self._asked or self._answer or self._closing:
                    self._changed.notify_all()

    def _write_frame(self, work: _Work) -> None:
        frame, flags, size, total = work.frame or _NOTHING, work.flags, 0, 0
        if frame.payload is not None:
            size = len(frame.payload)
            if self._summed:
                flags, total = flags | wire.SUMMED, wire.summed(frame.payload)
        head = wire.encode(work.kind, flags, work.number, work.acknowledged, frame.body, size, total)
        work.connection.out.write(head, frame.payload)

    def _goodbye(self, connection: Connection, acknowledged: int) -> None:
        with suppress(OSError):  # it has gone first
            connection.out.write(wire.encode(wire.BYE, 0, 0, acknowledged), None)
        with self._changed:
            self._bye = True
            self._changed.notify_all()


class _Silent(Exception):
    """Nothing has come for too long."""


def _in_words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return tls.in_words(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _is_final(error: BaseException) -> bool:
    """Would another attempt fail the same way? After a first success it is not asked: it may be damage on the way."""
    return isinstance(error, ssl.SSLError) and "job key" in tls.in_words(error)
