"""What workers of different hosts, and workers elsewhere and their deputies, tell each other, damaged (``fuzz.py``).

A case is a conversation: who says what, with which payload. What is said goes the way that it goes behind a link's
frame: decoded, its payload put where it belongs, heard; and what came with it is taken. A bad peer is refused in words
(FrameError, Senseless; ConfigError where an answer is owed), and nothing is made that is larger than what it may claim.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import nn

from paceline.engine.elsewhere.early import buckets
from paceline.engine.elsewhere.mail import Mail
from paceline.engine.elsewhere.making import check, make, make_all
from paceline.engine.elsewhere.owners import Owners
from paceline.engine.exchange.replica import Apart
from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.table import Table, decode, tabulate
from paceline.protocol import messages, mirrors, owners, remote
from paceline.protocol.deals import Deal
from paceline.protocol.link import Senseless
from paceline.transport import wire
from paceline.transport.frame import FrameError

REFUSES = (FrameError, Senseless, ConfigError)
_MOST_BYTES = 2**20  # of what has come, and of what is made of it
_FAILED = messages.Failed("ConfigError", "w", "y", "f")
_FOLLOW = mirrors.Follow(7, 1, [(0, 2.0, 1.0, b"\1\1"), (1, 1.0, 0.5, b"\1\0")], b"")
_STATE: Any = (
    {"0": {"step": {"$": "tensor", "key": "s.0"}, "kind": {"$": "tuple", "is": [1, 2.5]}}},
    {"s.0": ("float32", [2])},
)

_SHARE = bytes(4 * 32)  # of an owner, in the one cell of what is dense
_ROWS = torch.tensor([1, 3], dtype=torch.int32).numpy().tobytes().ljust(16, b"\0") + bytes(2 * 2 * 8)

# One of each at least; ``test_fuzz.py`` holds that none is missing. Of workers 1 and 2 in turn, to worker 0.
OWNERS: list[tuple[owners.Said, bytes]] = [
    (owners.Part(0, 1, 0), _SHARE),
    (owners.Part(0, 1, 0), _SHARE),
    (owners.Rows(0, 1, 1, 2, 0, False), _ROWS[:20]),
    (owners.Rows(0, 1, 1, 0, 0, True), b""),
    (owners.Rows(0, 1, 1, 2, 20, True), _ROWS[20:]),
    (owners.Given(0, 1), b""),
    (owners.Given(0, 1), b""),
    (owners.Fold(0, 1, 0), bytes(4 * 48)),
    (owners.Folded(0, 1), b""),
    (owners.Folded(0, 1), b""),
    (owners.Off(0, 2), b""),
    (owners.Rows(0, 2, 1, -2, 0, True), _ROWS),
    (
        owners.Letter(
            0,
            2,
            [
                owners.Enclosed(owners.Part(0, 2, 0), _SHARE),
                owners.Enclosed(owners.Rows(0, 2, 1, 2, 0, True), _ROWS),
                owners.Enclosed(owners.Given(0, 2), b""),
            ],
        ),
        b"",
    ),
]
NOTES: list[Any] = [
    remote.Fetched(0),
    remote.Drawn(0, 4),
    remote.Border(),
    remote.Left(0, 5),
    remote.Told(0.5, {"loss": 0.25}),
    remote.LocalStep(0, False, 1, True, b"\1\0"),
    remote.Dropped(0, True),
]


def _requests() -> list[Any]:
    settings = optimizers.encode([{"lr": 0.1, "betas": [0.9, 0.99]}])
    parameters = [
        remote.Parameter("w", (3, 2), (2, 1), "float32", 0, False),
        remote.Parameter("t", (4, 2), (2, 1), "float64", 0, True),
    ]
    table = msgspec.msgpack.encode(_table())
    return [
        remote.Who("host", 77),
        remote.WrapOptimizer("torch.optim.sgd:SGD", settings, parameters, None, b"spec", remote.HOST, [0], [0, 1]),
        remote.WrapOptimizer("torch.optim.adam:Adam", settings, parameters, _STATE, b"spec"),
        remote.CopyFirst(msgspec.msgpack.encode(tabulate([("w", 0, torch.zeros(2))]))),
        remote.WrapBuffers(table),
        remote.WrapLoader(9),
        remote.Barrier(),
        remote.Begin(0, 12, True, 3),
        remote.DrawLease(0, 12, 3, True),
        remote.DropLease(0),
        remote.BeginLease(0),
        remote.More(0),
        remote.End(0, True, 4),
        remote.Step(0, False, b"\1\1", {1: -3}, settings, True, 0.5),
        remote.Step(0, False, b"\1\1", {1: -3}, settings, finite=True),
        remote.Meet({0: settings}),
        remote.Norm(0, b"\1\1", {1: 2}, b"\1\0", 2.0),
        remote.Load(0, False, _STATE),
        remote.ShowState(0),
        remote.Finish(True, ["model"]),
        remote.Broke(_FAILED),
        remote.Counts(),
        remote.Fetching(),
        remote.NeedsGhost(0),
        remote.Leave(0),
        remote.IsWhole(0),
        remote.PushStore(0, {0: 1}, settings),
        remote.PullStore(0, 1),
        remote.AwaitStore(0),
        remote.Border(),
    ]


def _said() -> list[Any]:
    said: list[Any] = [
        remote.Piece("state/0", 0, 8),
        remote.Letter([remote.Enclosed("numbers/0/1", 0, 24, bytes(24)), remote.Enclosed("kept/1", 0, 96, bytes(32))]),
        remote.Ask([], remote.Meet({}), [remote.Enclosed("gradient/0/float32", 0, 16, bytes(16))]),
        remote.Answer(_status(), [True, 3, False]),
        remote.Answer(remote.Status(), None, _FAILED),
        remote.Stop("it is over"),
        mirrors.Took(0, 7),
        remote.Show(True),
        remote.Keep(_STATE, True),
        remote.Fill(),
        mirrors.SendFold(0, 7, [2.0, 1.0]),
        mirrors.SendOwn(0),
        mirrors.Close(0, _FOLLOW),
        remote.Shown(_STATE),
        remote.Shown(None, _FAILED),
        remote.Printed(b"text"),
        remote.Still(1.5),
        remote.Terminated(),
    ]
    return said + [remote.Ask(NOTES[place % len(NOTES) :][:2], request) for place, request in enumerate(_requests())]


def _status() -> remote.Status:
    return remote.Status(
        step=7,
        epochs=[1],
        verdicts={0: True},
        periods=[2],
        fresh={0: [1]},
        follow={0: _FOLLOW},
        brought={1: mirrors.Brought(7, 0, True)},
        apart=[2],
        deals=[None, Deal(0, 2, ((1, 2),))],
        workers=2,
    )


def _table() -> Table:
    made = [("w", 0, nn.Parameter(torch.zeros(3, 2))), ("t", 0, nn.Parameter(torch.zeros(4, 2)))]
    return tabulate(made, {id(made[1][2])})


SAID = _said()  # by workers elsewhere and deputies, one of each at least


# --- conversations ---


class Saying(msgspec.Struct, array_like=True):
    """What one of the others says, encoded."""

    sender: int
    payload: bytes
    message: bytes


_sayings = msgspec.msgpack.Decoder(list[Saying])
_encode, _decode = msgspec.msgpack.encode, msgspec.msgpack.decode
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    64,
    2**20,
    2**31,
    2**32,
    2**40,
    2**53,
    2**62 - 1,
    2**62,
    2**64 - 1,
    -1,
    -3,
    -(2**31),
    -(2**63),
)
_TEXTS = ("", "w", "state/0", "int64", "float32", "gradient/0/float32", "numbers/0/1", ".", "\0", "a" * 300)
_OTHERS = (
    None,
    True,
    b"",
    b"\0" * 9,
    [],
    {},
    [0],
    {"0": 0},
    {0: 0},
    0.5,
    float("nan"),
    float("inf"),
    *_NUMBERS,
    *_TEXTS,
)


def _conversation(*said: tuple[Any, bytes]) -> bytes:
    return _encode([Saying(number % 2 + 1, payload, _encode(one)) for number, (one, payload) in enumerate(said)])


def twisted(sample: bytes, random_: random.Random, damaged: Callable[[bytes], bytearray]) -> bytes:
    """One to three things of it made others: values of another type, out of range or absurd, or twice there; payloads
    of another size; bytes; what is said said twice, or not at all."""
    said = _sayings.decode(sample)
    for _ in range(random_.randrange(1, 4)):
        place = random_.randrange(len(said))
        one = said[place]
        match random_.randrange(10):
            case 0:
                said.insert(random_.randrange(len(said) + 1), copy.copy(one))
            case 1 if len(said) > 1:
                del said[place]
            case 2:
                one.payload = random_.choice((b"", one.payload[:-1], one.payload + b"\0", damaged(one.payload)))
            case 3 | 4:
                one.message = bytes(damaged(one.message))
            case _:
                one.message = _twisted(one.message, random_)
    return _encode(said)


def _twisted(message: bytes, random_: random.Random) -> bytes:
    try:
        whole = [_decode(message)]
    except (ValueError, msgspec.DecodeError):
        return message  # it was damaged before
    holder, key = random_.choice(_places(whole, []))
    if isinstance(holder, list) and random_.random() < 0.1:
        holder.insert(key, copy.deepcopy(holder[key]))
        return _encode(whole[0])
    before = holder[key]
    match before:
        case bytes() if before and random_.random() < 0.7:
            place = random_.randrange(len(before))
            changed: Any = before[:place] + random_.choice((b"", random_.randbytes(1) + before[place + 1 :]))
        case bool() if random_.random() < 0.7:
            changed = not before
        case int() if random_.random() < 0.8:
            changed = random_.choice((*_NUMBERS, max(before - 1, 0), min(before + 1, 2**63)))
        case str() if random_.random() < 0.8:
            changed = random_.choice(_TEXTS)
        case _:
            changed = copy.deepcopy(random_.choice(_OTHERS))
    holder[key] = changed
    return _encode(whole[0])


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Where in it there is something: (a list or dict, index or key)."""
    pairs = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in pairs:
        found.append((value, key))
        _places(item, found)
    return found


class Network:
    """That of ``Owners``, to nobody."""

    rank, others = 0, (1, 2)

    def add(self, exchange: int, hears: Any) -> None: ...

    def send(self, other: int, message: owners.Said, payload: memoryview | None = None) -> None: ...

    def flush(self) -> None: ...


class HeardByOwners:
    """By worker 0 of three, of an optimizer of one matrix and one table."""

    def __init__(self) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(owners.Any_)
        self._table = tabulate(
            [
                ("w", 0, nn.Parameter(torch.zeros(16, 6))),
                ("t", 0, table := nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))),
            ],
            {id(table)},
        )
        self._folds = Apart.of(self._table)

    def __call__(self, data: bytes) -> None:
        network: Any = Network()
        mine = Owners(0, network, self._table, buckets(self._table), self._folds, lambda: False)
        mine.begin(1, is_on=True)
        for saying in _read(data):
            message, sender = wire.decode_body(self._decoder, saying.message), saying.sender % 2 + 1
            if saying.payload:
                _lay(mine.place(sender, message, len(saying.payload)), saying.payload)
            mine.heard(sender, message, len(saying.payload))
        self._fold(mine)

    def _fold(self, mine: Owners) -> None:
        """What of it is to be folded."""
        gathering = mine._gathering
        while gathering.has_next:
            cell, ticket = gathering.next()
            mine._fold(gathering.number, cell, gathering.shares)
            gathering.fold(gathering.number, cell, ticket, gathering.shares)


def _read(data: bytes) -> list[Saying]:
    try:
        return _sayings.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise FrameError("a damaged case") from None


def _lay(place: memoryview | None, payload: bytes) -> None:
    """As a link does it."""
    if place is None or len(place) != len(payload):
        raise Senseless("nobody expects so much")
    place[:] = payload


class HeardByDeputy:
    """By a deputy, and by its worker: what of it is arrays, documents, tables and settings is taken."""

    def __init__(self) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(remote.Any_)
        self._parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4, 2))]
        self._settings = make(_requests()[1])[0]

    def __call__(self, data: bytes) -> None:
        mail = Mail(_MOST_BYTES)
        mail.expect("gradient/0/float32", torch.zeros(4))
        mail.make_room("numbers/0/1", torch.zeros(5, dtype=torch.int64))
        for saying in _read(data):
            message = wire.decode_body(self._decoder, saying.message)
            if saying.payload:
                # A link is not let claim what it does not expect either.
                _lay(mail.place(None, message, len(saying.payload)), saying.payload)  # type: ignore[arg-type]
            mail.open(message)
            self._take(mail, message)
        assert sum(map(len, mail._boxes.values())) == mail._boxes_bytes <= _MOST_BYTES

    def _take(self, mail: Mail, message: Any) -> None:
        match message:
            case remote.Ask(request=request):
                self._take_request(mail, request)
            case remote.Keep(kept=kept) | remote.Shown(kept=kept) if kept is not None:
                mail.take_packed("state", kept)
            case remote.Answer(value=value, status=status):
                mail.take_states("state", value, self._parameters)
                for told in status.follow.values():
                    self._follow(told)
            case mirrors.Close(follow=told):
                self._follow(told)

    def _take_request(self, mail: Mail, request: Any) -> None:
        match request:
            case remote.WrapOptimizer() if check(request.parameters) <= _MOST_BYTES:
                make(request)
            case remote.CopyFirst(table=table) | remote.WrapBuffers(table=table):
                entries = decode(table).entries
                if check(entries) <= _MOST_BYTES:
                    for place, tensor in enumerate(make_all(entries)):
                        mail.take_into(f"state/{place}", tensor)
            case remote.Step(settings=settings) | remote.PushStore(settings=settings):
                optimizers.load_settings(self._settings, optimizers.decode(settings))
            case remote.Load(state=state):
                mail.take_states("state", state, self._parameters)

    def _follow(self, told: mirrors.Follow) -> None:
        if mirrors.mistaken(told, 2, 2, 64) is None:
            assert all(worker in (0, 1) for worker, *_ in told.sources)


def by_owners() -> list[bytes]:
    """A whole round and what may come before the next, and parts of it."""
    return [_conversation(*OWNERS), *(_conversation(*OWNERS[place : place + 4]) for place in range(0, 9, 2))]


def by_deputies() -> list[bytes]:
    """Each message, with the arrays that come before it."""
    state = (remote.Piece("state/0", 0, 8), bytes(8))
    pieces = [
        (remote.Piece("gradient/0/float32", 0, 16), bytes(8)),
        (remote.Piece("gradient/0/float32", 8, 16), bytes(8)),
        (remote.Piece("numbers/0/1", 0, 24), bytes(24)),
        (remote.Piece("kept/1", 0, 4096), bytes(64)),
        (remote.Piece("kept/1", 64, 4096), bytes(64)),
    ]
    return [_conversation(*pieces), *(_conversation(state, (said, b"")) for said in SAID)]
