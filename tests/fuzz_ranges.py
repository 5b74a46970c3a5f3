"""What is said to and by servers elsewhere, damaged (``fuzz_said.py``): as such a server hears home and workers, as its
deputy hears it, and as a worker does."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import nn, optim

from paceline.config import Async, Job, Sync
from paceline.engine.elsewhere import specs
from paceline.engine.elsewhere.mail import Mail
from paceline.engine.elsewhere.range_deputy import ROLE, _Deputy, _ServedElsewhere
from paceline.engine.elsewhere.range_links import RangeLinks, Spread
from paceline.engine.elsewhere.range_server import RangeServer, Stopped, _Held
from paceline.engine.exchange.server import Served
from paceline.engine.exchange.spec import describe
from paceline.errors import HostError
from paceline.params.state import StatePlan
from paceline.protocol import messages, mirrors, ranges, remote
from paceline.protocol.link import Peer
from paceline.transport import wire
from paceline.transport.ends import Ended, Joined, LinkEnded, Received
from paceline.transport.slots import ExchangeMemory, Spec, size_bytes
from tests.fuzz_said import REFUSES as _REFUSES
from tests.fuzz_said import Saying, _encode, _lay, _read, _twisted

_SERVER, _WORKERS = 1, 2
_MOST_BYTES = 2**22  # of an exchange: one may be larger, but not here
# Who says it: to a server home, workers 0 and 1 (1 and 2 here), and one that is none; to a deputy its server, and
# another; to a worker.
HOME, WORKER, STRANGER, DEPUTY, AT_WORKER = 0, 0, 99, 100, 110


class Raised(Exception):
    """The user's optimizer has, stepped with settings or state that are none of its: home is told so."""


REFUSES = (*_REFUSES, HostError, Stopped, LinkEnded, Raised)


def spec(*, log: bool) -> Spec:
    weight = nn.Parameter(torch.zeros(16, 18))
    table = nn.Parameter(torch.zeros(96, 2, dtype=torch.float64))
    job = Job(name="fuzz", workers=_WORKERS, servers=2, pace=Async() if log else Sync())
    optimizer = optim.Adagrad([{"params": [weight]}, {"params": [table]}], lr=0.1)
    described = describe(optimizer, {}, {id(table)}, job, job.pace)[0]
    sizes = {"workers": _WORKERS, "servers": 2, "shares": 2, "hosts": 2, "parts": 4 if log else 0, "stamps": True}
    return msgspec.structs.replace(described, settings_bytes=512, **sizes)


ROUNDS, LOG = spec(log=False), spec(log=True)
SPECS = {msgspec.msgpack.encode(one): one for one in (ROUNDS, LOG)}
_STATE_BYTES = StatePlan(ROUNDS.table, ROUNDS.state, ROUNDS.blocks).size_bytes
_MASK = b"\1\1"
_SETTINGS = ROUNDS.settings
_FOLLOW = mirrors.Follow(1, 0, [(0, 2.0, 1.0, _MASK), (1, -1.0, 1.0, b"")], _SETTINGS)
_BOTH = mirrors.Follow(2, 0, [(0, 2.0, 1.0, _MASK), (1, 1.0, 0.5, _MASK)], _SETTINGS)
_NUMBERS = torch.tensor([5, 40, 95]).numpy().tobytes()


def _piece(what: str, payload: bytes, start: int = 0, total: int | None = None) -> tuple[Any, bytes]:
    return remote.Piece(what, start, len(payload) if total is None else total), payload


def _pushed(index: int) -> list[tuple[int, Any, bytes]]:
    """What a worker brings."""
    pieces = [
        _piece(f"gradient/{index}/float32", bytes(256), 1024, 1280),
        _piece(f"count/{index}/1", (3).to_bytes(8, "little")),
        _piece(f"numbers/{index}/1", _NUMBERS),
        _piece(f"values/{index}/1", bytes(48)),
    ]
    return [(WORKER + 1, *piece) for piece in pieces]


def _steps() -> list[list[tuple[int, Any, bytes]]]:
    return [
        [*_pushed(0), (HOME, ranges.Step(0, _FOLLOW), b"")],
        [*_pushed(0), (HOME, ranges.Step(0, _BOTH), b""), (WORKER + 2, ranges.Want(0, 7, 0), b"")],
        [*_pushed(1), (HOME, ranges.Apply(1, 3, 1, 2, [(0, 1, 1.0, _MASK)], [0], _SETTINGS), b"")],
        [
            *_pushed(1),
            (HOME, ranges.Apply(1, 1, 1, 0, [(0, 1, 2.0, _MASK), (1, 1, 1.0, _MASK)], [1, 0], _SETTINGS), b""),
        ],
        [(HOME, ranges.Apply(1, 3, 1, 0, [], [1], b""), b"")],
    ]


def _server() -> list[list[tuple[int, Any, bytes]]]:
    """What a server hears."""
    filled = [
        (HOME, ranges.Attach(2, msgspec.msgpack.encode(ROUNDS)), b""),
        (HOME, *_piece("parameters/2/float32", bytes(256), 1024, 1280)),
        (HOME, *_piece("state/2", bytes(64), 64, _STATE_BYTES)),
        (HOME, ranges.Fill(2, 1), b""),
        (WORKER + 1, ranges.Want(2, 1, 1), b""),
    ]
    return [
        *_steps(),
        [(HOME, ranges.Fetch(0, 7), b""), (HOME, ranges.Fetch(1, 5), b""), (HOME, ranges.Stop("over"), b"")],
        [(WORKER + 1, ranges.Want(0, 1, 0), b""), (WORKER + 2, ranges.Want(1, 1, 3), b""), filled[3]],
        [(STRANGER, ranges.Want(0, 1, 0), b"")],
        [(WORKER + 1, ranges.Step(0, _FOLLOW), b"")],
        *([one] for one in filled[:1]),
        filled,
    ]


def _deputy() -> list[list[tuple[int, Any, bytes]]]:
    """What a deputy hears, which has asked for round 3, entry 3 of each part, and a fetch."""
    said: list[Any] = [
        ranges.Here("10.0.0.1", 4711),
        ranges.Stepped(0, 3),
        ranges.Applied(1, 1, 2),
        ranges.Applied(1, 3, 3),
        ranges.Fetched(0, 7),
        ranges.Terminated(),
        ranges.Failing(messages.Failed("ConfigError", "w", "y", "f")),
    ]
    pieces = [_piece("parameters/0/float32", bytes(256), 1024, 1280), _piece("state/0", bytes(64), 0, _STATE_BYTES)]
    return [
        [(DEPUTY, one, b"") for one in said],
        [(DEPUTY, *pieces[0]), (DEPUTY, *pieces[1]), (DEPUTY, said[4], b"")],
        *([(DEPUTY, one, b"")] for one in said[1:]),
        [(STRANGER + DEPUTY, said[1], b"")],
    ]


def _worker() -> list[list[tuple[int, Any, bytes]]]:
    """What a worker hears, which waits for round 3 of exchange 0."""
    newest: Any = ranges.Newest(0, ranges.SHARE, 3, [1])
    pieces = [
        _piece("parameters/0/float32", bytes(256), 1024, 1280),
        _piece("numbers/0/0/1", _NUMBERS),
        _piece("rows/0/0/1", bytes(48)),
    ]
    heard = [(AT_WORKER, *piece) for piece in pieces]
    return [
        [*heard, (AT_WORKER, newest, b"")],
        [(AT_WORKER, newest, b"")],
        [*heard, (AT_WORKER, newest, b""), *heard, (AT_WORKER, ranges.Newest(0, ranges.WHOLE, 1, []), b"")],
    ]


SAID = [one for said in (*_server(), *_deputy(), *_worker()) for one in said]


def by_ranges() -> list[bytes]:
    """Conversations, each with one hearer."""
    conversations = [*_server(), *_deputy(), *_worker()]
    return [
        msgspec.msgpack.encode([Saying(sender, payload, _encode(one)) for sender, one, payload in said])
        for said in conversations
    ]


class _Link:
    """To nobody."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.peer_left = peer, False

    def send(self, message: Any, payload: Any = None, timeout_s: float | None = None) -> None: ...

    def flush(self, timeout_s: float | None = None) -> None: ...

    def end(self, reason: str) -> None: ...


class HeardByRanges:
    """What is said goes the way that it goes behind a link, to its hearer: the first one says which."""

    def __init__(self) -> None:
        self._decoders = {
            said: msgspec.msgpack.Decoder(said)
            for said in (ranges.FromHome, ranges.FromWorker, ranges.ToHome, ranges.ToWorker)
        }
        self._server: _Server | None = None
        self._deputy, self._worker = _AtDeputy(), _AtWorker()

    def __call__(self, data: bytes) -> None:
        said = _read(data)
        if not said:
            return
        if said[0].sender < DEPUTY:
            if self._server is None or self._server.is_spoilt:
                self._server = _Server()
            self._server.reset()
            self._server.hear(said, self._decoders)
        elif said[0].sender < AT_WORKER or said[0].sender == STRANGER + DEPUTY:
            self._deputy.hear(said, self._decoders[ranges.ToHome])
        else:
            self._worker.hear(said, self._decoders[ranges.ToWorker])


def _tell(
    link: Any,
    decoder: msgspec.msgpack.Decoder[Any],
    saying: Saying,
    place: Callable[..., memoryview | None],
    sink: Callable[[Any], None],
) -> Any:
    message = wire.decode_body(decoder, saying.message)
    if saying.payload:
        _lay(place(link, message, len(saying.payload)), saying.payload)
    sink(Received(link, message, None))
    return message


class _Server:
    """Server 1, which has two exchanges: one in rounds, one with a log."""

    def __init__(self) -> None:
        self.is_spoilt = False
        server = self._server = RangeServer.__new__(RangeServer)
        self._home: Any = _Link(Peer(_SERVER, "deputy"))
        server._server, server._home, server._events = _SERVER, self._home, queue.SimpleQueue()
        server._mails, server._home_mail, server._held = {}, Mail(0), {}
        server._workers, server._wants, server._expecting = {}, {}, threading.Lock()
        self._links = {sender: _Link(Peer(sender - 1, "worker")) for sender in (1, 2, STRANGER)}
        for index, encoded in enumerate(SPECS):
            server._hear_home(Received(self._home, ranges.Attach(index, encoded), None))

    def reset(self) -> None:
        server = self._server
        server._events, server._wants, server._workers = queue.SimpleQueue(), {}, {}
        server._held = {index: held for index, held in server._held.items() if index < len(SPECS)}
        for held in server._held.values():
            held.memory._memory[:] = bytes(len(held.memory._memory))
            held.loads, held._done = 0, dict.fromkeys(held.parts, 0)
            held.memory.state.present.fill_(1)  # an Adagrad has state from the beginning
            held._told.clear()

    def hear(self, said: list[Saying], decoders: dict[Any, msgspec.msgpack.Decoder[Any]]) -> None:
        server, joined = self._server, set()
        for saying in said:
            link: Any = self._links.get(saying.sender, self._home)
            if link is self._home:
                heard = _tell(link, decoders[ranges.FromHome], saying, server._home_mail.place, self._hear_home)
                # Settings stay with those who step.
                told = heard.follow if isinstance(heard, ranges.Step) else heard
                self.is_spoilt |= getattr(told, "settings", _SETTINGS) != _SETTINGS
            else:
                if saying.sender not in joined:
                    joined.add(saying.sender)
                    server._hear_worker(Joined(link))
                _tell(link, decoders[ranges.FromWorker], saying, server._place, server._hear_worker)
            self._take()
            assert not any(mail._boxes for mail in (server._home_mail, *server._mails.values()))

    def _hear_home(self, event: Any) -> None:
        told = event.message
        is_new = isinstance(told, ranges.Attach) and told.spec not in SPECS
        if is_new and size_bytes(specs.decode(told.spec)) > _MOST_BYTES:
            raise HostError("too large for here")
        self._server._hear_home(event)

    def _take(self) -> None:
        while not self._server._events.empty():
            try:
                self._server._take(self._server._events.get())
            except Exception as error:
                self.is_spoilt = not isinstance(error, Stopped)  # some of it may have been done
                if isinstance(error, REFUSES):
                    raise
                if _is_optimizers(error):
                    raise Raised from error
                raise


def feed_spec(data: bytes) -> None:
    """A server has an exchange like this, and steps it."""
    one = specs.decode(data)
    if size_bytes(one) > _MOST_BYTES:
        return
    held = _Held(0, one, _SERVER)
    held.loads = 0
    held.memory.state.present.fill_(1)  # an Adagrad has state from the beginning
    mask = b"\1" * len(one.table.entries)
    try:
        if one.parts:
            for part in held.parts:
                held.apply(ranges.Apply(0, part, 1, 0, [(0, 1, 1.0, mask)], [0], one.settings))
        else:
            held.step(ranges.Step(0, mirrors.Follow(1, 0, [(0, 1.0, 1.0, mask)], one.settings)))
    except REFUSES:
        raise
    except Exception as error:
        if _is_optimizers(error):
            raise Raised from error
        raise


def twisted_spec(sample: bytes, random_: random.Random, damaged: Callable[[bytes], bytearray]) -> bytes:
    """As ``fuzz_said.twisted``."""
    if random_.random() < 0.1:
        return bytes(damaged(sample))
    for _ in range(random_.randrange(1, 4)):
        sample = _twisted(sample, random_)
    return sample


def _is_optimizers(error: Exception) -> bool:
    """Has it been raised by an optimizer's class, or what stands for its step? Not for rows that are not there."""
    if isinstance(error, IndexError):
        return False
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/optim/" in code.co_filename or code.co_filename.endswith("kernels.py") or code.co_name == "clone":
            return True
        trace = trace.tb_next
    return False


class _AtDeputy:
    """The deputy of server 1."""

    def __init__(self) -> None:
        self._link: Any = _Link(Peer(_SERVER, ROLE))
        self._stranger: Any = _Link(Peer(_SERVER, "worker"))
        self._memories = [ExchangeMemory(bytearray(size_bytes(one)), one) for one in SPECS.values()]

    def hear(self, said: list[Saying], decoder: msgspec.msgpack.Decoder[Any]) -> None:
        context: Any = _Context()
        deputy = _Deputy(context)
        deputy.sink(Joined(self._link))
        for index, (encoded, one) in enumerate(SPECS.items()):
            memory: Any = self._memories[index]
            memory._memory[:] = bytes(len(memory._memory))
            at_home = _served(one, memory)
            made = _ServedElsewhere(at_home, index, encoded, self._link, context.board, _SERVER, deputy.check)
            made._stepped, made._applied, made._wanted = 3, [3] * one.parts, 7
            made.expect(deputy.mail)
            deputy._served[index] = made
        for saying in said:
            link = self._link if saying.sender < AT_WORKER else self._stranger
            _tell(link, decoder, saying, deputy.place, deputy.sink)
        assert not deputy.mail._boxes
        assert deputy.mail.events.qsize() <= 1
        deputy.check()


def _served(one: Spec, memory: ExchangeMemory) -> Served:
    hands: Any = None  # of a deputy, which steps nothing
    return Served(one, memory, 0, hands, hands)


class _Context:
    """The board and the channel of a deputy."""

    rank = _SERVER

    def __init__(self) -> None:
        self.board = self.channel = self

    def ring(self, member: int) -> None: ...

    def send(self, message: Any) -> None: ...


class _AtWorker:
    """Worker 0, which waits for server 1."""

    def __init__(self) -> None:
        self._link: Any = _Link(Peer(_SERVER, ROLE))
        self._memory = ExchangeMemory(bytearray(size_bytes(ROUNDS)), ROUNDS)
        links = self._links()
        self._spread = Spread(0, ROUNDS, links)
        entry = ROUNDS.table.entries[1]
        self._table = ROUNDS.table.view(entry, self._memory.params[entry.vector])

    def _links(self) -> RangeLinks:
        links = RangeLinks.__new__(RangeLinks)
        links._changed, links._mails = threading.Condition(), {_SERVER: Mail(2**20)}
        links._came, links._tables, links._lost, links._wants = {}, [], None, 0
        links._links = {_SERVER: self._link}
        return links

    def hear(self, said: list[Saying], decoder: msgspec.msgpack.Decoder[Any]) -> None:
        links = self._spread._links = self._links()
        self._spread.expect(self._memory)
        for saying in said:
            _tell(self._link, decoder, saying, links._place, links._sink)
        links._sink(Ended(self._link, "over"))
        mail = links.mail(_SERVER)
        for told in (remote.Await(3, comes=True, loads=0), remote.Await(3, comes=False, loads=0)):
            self._spread.take_newest(told, {1: self._table}.__getitem__)
        assert sum(map(len, mail._boxes.values())) == mail._boxes_bytes <= 2**20
