"""What is said to and by servers elsewhere that can be decoded and yet cannot be: it is refused in words."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from paceline.engine.elsewhere import specs
from paceline.engine.elsewhere.range_deputy import _Deputy
from paceline.errors import ConfigError, HostError, PacelineError, kind_of
from paceline.protocol import messages, mirrors, ranges, remote
from paceline.protocol.link import Peer, Senseless
from paceline.transport.ends import Joined, Received
from paceline.transport.frame import FrameError
from tests import fuzz_ranges
from tests.fuzz_ranges import AT_WORKER, DEPUTY, HOME, LOG, ROUNDS, STRANGER
from tests.fuzz_said import Saying, _encode

ALL = b"\1\1"
FIRST, SECOND = 1, 2  # workers 0 and 1

Said = tuple[int, Any, bytes]


def hear(*said: Said) -> None:
    spoken = [Saying(sender, payload, _encode(message)) for sender, message, payload in said]
    fuzz_ranges.HeardByRanges()(msgspec.msgpack.encode(spoken))


def piece(sender: int, what: str, payload: bytes) -> Said:
    return sender, remote.Piece(what, 0, len(payload)), payload


def rows(index: int, *numbers: int, count: int | None = None) -> list[Said]:
    """Of worker 0."""
    told = len(numbers) if count is None else count
    return [
        piece(FIRST, f"count/{index}/1", told.to_bytes(8, "little", signed=True)),
        piece(FIRST, f"numbers/{index}/1", torch.tensor(numbers).numpy().tobytes()),
    ]


def step(*sources: tuple[int, float, float, bytes], number: int = 1, index: int = 0, settings: bytes = b"") -> Said:
    return HOME, ranges.Step(index, mirrors.Follow(number, 0, list(sources), settings or ROUNDS.settings)), b""


def apply(
    part: int, members: Sequence[tuple[int, int, float, bytes]], workers: Sequence[int], index: int = 1, number: int = 1
) -> Said:
    return HOME, ranges.Apply(index, part, number, 0, members, workers, LOG.settings if members else b""), b""


ONE = (0, 1.0, 1.0, ALL)
NEW = (HOME, ranges.Attach(2, msgspec.msgpack.encode(ROUNDS)), b"")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([step(ONE, index=5)], "home speaks of exchange 5; this server has 2"),
        ([step(ONE, index=1)], "is stepped as entries of the log come"),
        ([step(ONE), step(ONE)], "round 1 behind round 1"),
        ([step()], r"what workers \[\] of 2"),
        ([step((7, 1.0, 1.0, ALL))], r"workers \[7\] of 2"),
        ([step((0, 1.0, 1.0, b"\1"))], "1 gradients for 2 parameters"),
        ([step((0, 1.0, 1.0, b""))], "has not said what gradients"),
        ([step((0, float("nan"), 1.0, ALL))], "with weight nan"),
        ([step(ONE, (1, 1.0, -1.0, ALL))], "factor -1.0"),
        ([step(ONE, settings=bytes(999))], "settings of 999 bytes in room for 512"),
        ([step(ONE, settings=b"\x90")], "settings of 0 groups are not for 2"),
        ([NEW, step(ONE, index=2)], "has not sent the values"),
        ([NEW, (HOME, ranges.Fetch(2, 7), b"")], "has not sent the values"),
        ([(HOME, ranges.Fetch(2, 7), b"")], "exchange 2"),
        ([(HOME, ranges.Fill(2, 0), b"")], "exchange 2"),
        ([(HOME, ranges.Attach(7, NEW[1].spec), b"")], "a new exchange 7; this server has 2"),
        ([*rows(0, 5, 96), step(ONE)], "rows that table 1 of 96 rows has not"),
        ([*rows(0, -1), step(ONE)], "rows that table 1"),
        ([*rows(0, 5, count=97), step(ONE)], "rows that table 1"),
        ([*rows(0, 5, count=-(2**63)), step(ONE)], "rows that table 1"),
        ([*rows(0, 5, 3), step(ONE)], "not in order"),
        ([*rows(0, 5, 5), step(ONE)], "not in order"),
        ([*rows(1, 96), apply(3, [(0, 1, 1.0, ALL)], [0])], "rows that table 1"),
        ([apply(3, [], [0], index=0)], "that is stepped in rounds"),
        ([apply(0, [], [0])], r"part 0; here are parts \[1, 3\] of 4"),
        ([apply(3, [], [])], "nobody gets a copy of"),
        ([apply(3, [], [2])], r"copy for workers \[2\] of 2"),
        ([apply(3, [(9, 1, 1.0, ALL)], [0])], r"push of workers \[9\] of 2"),
        ([apply(3, [(0, 1, 1.0, b"")], [0])], "0 gradients of worker 0"),
        ([apply(3, [], [0], number=2), apply(3, [], [0])], "entry 1 to part 3, behind entry 2"),
        ([(HOME, ranges.Apply(1, 3, 1, 0, [], [0], b"\x90"), b"")], "nobody who has them"),
    ],
)
def test_a_server_does_not_step_what_cannot_be(said: list[Said], why: str) -> None:
    with pytest.raises((HostError, ConfigError), match=why):
        hear(*said)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((STRANGER, ranges.Want(0, 1, 0), b""), "worker of host 98 is none of 2 workers"),
        (piece(FIRST, "parameters/0/float32", bytes(1280)), "nobody expects"),
        (piece(FIRST, "gradient/7/float32", bytes(1280)), "nobody expects"),
        (piece(HOME, "gradient/0/float32", bytes(1280)), "nobody expects"),
        (piece(HOME, "kept/0", bytes(8)), "nobody expects"),
        (piece(FIRST, "numbers/0/1", bytes(8 * 97)), "nobody expects"),
        ((STRANGER + DEPUTY, ranges.Stepped(0, 3), b""), "which worker of host 1 is not"),
        (piece(STRANGER + DEPUTY, "parameters/0/float32", bytes(1280)), "nobody expects"),
        (piece(DEPUTY, "kept/0", bytes(8)), "nobody expects"),
        ((DEPUTY, ranges.Stepped(0, 4), b""), "was not asked for"),
        ((DEPUTY, ranges.Stepped(0, 0), b""), "was not asked for"),
        ((DEPUTY, ranges.Stepped(9, 1), b""), "exchange 9 is not with this server"),
        ((DEPUTY, ranges.Applied(1, 3, 4), b""), "was not asked for"),
        ((DEPUTY, ranges.Applied(1, 2, 1), b""), "was not asked for"),
        ((DEPUTY, ranges.Applied(1, -1, 1), b""), "was not asked for"),
        ((DEPUTY, ranges.Applied(0, 0, 1), b""), "was not asked for"),
        ((DEPUTY, ranges.Fetched(0, 8), b""), "was not asked for"),
        ((AT_WORKER, ranges.Newest(0, 0, 3, [1] * (2**16 + 1)), b""), "more than there can be"),
    ],
    ids=lambda said: type(said[1]).__name__ if isinstance(said, tuple) else said,
)
def test_what_nobody_expects_ends_the_link(said: Said, why: str) -> None:
    with pytest.raises(Senseless, match=why):
        hear(said)


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (FIRST, ranges.Step(0, mirrors.Follow(1, 0, [ONE], b""))),
        (FIRST, ranges.Fill(0, 0)),
        (FIRST, remote.Stop("over")),
        (FIRST, ranges.Stepped(0, 1)),
        (HOME, ranges.Want(0, 1, 0)),
        (HOME, ranges.Stepped(0, 1)),
        (DEPUTY, ranges.Fetch(0, 7)),
        (DEPUTY, ranges.Newest(0, 0, 1, [])),
        (DEPUTY, ranges.Here("a b", 1)),
        (DEPUTY, ranges.Here("", 1)),
        (DEPUTY, ranges.Here("a\n", 1)),
        (DEPUTY, ranges.Here("a", 0)),
        (DEPUTY, ranges.Here("a", 2**16)),
        (AT_WORKER, remote.Stop("over")),
        (AT_WORKER, ranges.Fetched(0, 1)),
        (AT_WORKER, ranges.Newest(0, -2, 1, [])),
        (AT_WORKER, ranges.Newest(0, 0, 1, [-1])),
    ],
    ids=str,
)
def test_each_hears_only_what_is_meant_for_it(sender: int, message: Any) -> None:
    with pytest.raises(FrameError):
        hear((sender, message, b""))


def test_rows_come_as_the_gradient_has_them_where_that_is_said() -> None:
    hear(*rows(0, 5, 3, 5, count=-3), step(ONE))


def test_a_server_says_once_where_it_is() -> None:
    here = (DEPUTY, ranges.Here("10.0.0.1", 1), b"")
    hear(here)
    with pytest.raises(Senseless, match="has said where it is"):
        hear(here, here)


@pytest.mark.parametrize("peer", [Peer(0, "server"), Peer(1, "worker")])
def test_a_deputy_has_one_server(peer: Peer) -> None:
    context: Any = SimpleNamespace(rank=1, board=None, channel=None)
    link: Any = SimpleNamespace(peer=peer)
    with pytest.raises(Senseless, match="deputy of server 1"):
        _Deputy(context).sink(Joined(link))
    deputy = _Deputy(context)
    link.peer = Peer(1, "server")
    deputy.sink(Joined(link))
    with pytest.raises(Senseless, match="deputy of server 1"):
        deputy.sink(Joined(SimpleNamespace(peer=Peer(1, "server"))))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["annotations", "__name__", "globals", "nothing", ""])
def test_a_failure_of_no_kind_is_one_of_the_host(kind: str) -> None:
    assert kind_of(kind) is PacelineError
    with pytest.raises(HostError, match="what"):
        hear((DEPUTY, ranges.Failing(messages.Failed(kind, "what")), b""))


# --- a worker ---


def newest(numbers: Sequence[int], rows: int, *, number: int = 3, tables: Sequence[int] = (1,)) -> list[Said]:
    param = tables[0]
    pieces = [
        piece(AT_WORKER, f"numbers/0/0/{param}", torch.tensor(numbers).numpy().tobytes()),
        piece(AT_WORKER, f"rows/0/0/{param}", bytes(16 * rows)),
    ]
    return [*(one for one in pieces if one[2]), (AT_WORKER, ranges.Newest(0, 0, number, tables), b"")]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (newest([5, 96], 2), "rows of parameter 1 that it has not"),
        (newest([-1], 1), "rows of parameter 1 that it has not"),
        (newest([5], 1, tables=[0]), "rows of parameter 0 that it has not"),
        (newest([5], 1, tables=[2**40]), "that it has not"),
        (newest([5], 1, tables=[1, 1]), "that it has not"),
        (newest([], 0), "that it has not"),
        (newest([5, 6], 1), "came as 16 bytes"),
        (newest([5], 3), "came as 48 bytes"),
        (newest([5], 1, number=3 + 2**11), "not 3"),
    ],
)
def test_a_worker_takes_no_rows_that_cannot_be(said: list[Said], why: str) -> None:
    with pytest.raises((HostError, ConfigError), match=why):
        hear(*said)


# --- wants ---


def test_who_comes_to_a_place_is_not_answered_what_another_has_asked_there() -> None:
    server = fuzz_ranges._Server()
    server.reset()
    sent: list[Any] = []
    old, new = (fuzz_ranges._Link(Peer(0, "worker", incarnation)) for incarnation in (0, 1))
    new.send = lambda message, payload=None, timeout_s=None: sent.append(message)  # type: ignore[method-assign]
    one: Any = server._server

    def say(event: Any) -> None:
        one._hear_worker(event)
        server._take()

    say(Joined(old))  # type: ignore[arg-type]
    say(Received(old, ranges.Want(0, 9, 1), None))  # type: ignore[arg-type]
    say(Joined(new))  # type: ignore[arg-type]
    say(Received(old, ranges.Want(0, 10, 1), None))  # type: ignore[arg-type]
    say(Received(new, ranges.Want(0, 1, 1), None))  # type: ignore[arg-type]
    assert not sent
    one._hear_home(Received(server._home, ranges.Fill(0, 1), None))
    server._take()
    assert [message.number for message in sent if isinstance(message, ranges.Newest)] == [1]


# --- specs ---

ENTRY = ROUNDS.table.entries[0]
ROWS = ROUNDS.table.entries[1]
ITEM = ROUNDS.state[0]
replace = msgspec.structs.replace


def with_entry(place: int, **changed: Any) -> dict[str, Any]:
    entries = list(ROUNDS.table.entries)
    entries[place] = replace(entries[place], **changed)
    return {"table": replace(ROUNDS.table, entries=tuple(entries))}


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 0},
        {"workers": 2**40},
        {"servers": -1},
        {"parts": 2**40},
        {"parts": -1},
        {"shares": 2**40},
        {"hosts": 0},
        {"settings_bytes": 1},
        {"settings_bytes": 2**40},
        {"settings": b"\xc1"},
        {"settings": b"\x90"},
        {"compensate": float("nan")},
        {"compensate": 1e39},
        with_entry(0, shape=(2**20, 2**20), size=2**40),
        with_entry(0, size=2**40),
        with_entry(0, dtype="object"),
        with_entry(0, offset=64),
        with_entry(0, offset=-64),
        with_entry(0, group=2),
        with_entry(0, stride=(2**40, 1)),
        with_entry(1, row=3),
        with_entry(1, row=-2),
        with_entry(1, row=0),
        with_entry(1, stride=(1, 96)),
        {"table": replace(ROUNDS.table, sizes={"float32": 320})},
        {"table": replace(ROUNDS.table, sizes=ROUNDS.table.sizes | {"float32": 2**50})},
        {"state": (replace(ITEM, param=2),)},
        {"state": (replace(ITEM, param=-1),)},
        {"state": (replace(ITEM, dtype="object"),)},
        {"state": (replace(ITEM, kind="nothing"),)},
        {"state": (replace(ITEM, shape=(-1,)),)},
        {"state": (replace(ITEM, shape=(2**60,)),)},
        {"state": (replace(ITEM, kind="float", shape=(2,)),)},
        {"state": (replace(ITEM, kind="like", shape=(3,)),)},
    ],
    ids=lambda changed: str(changed)[:80],
)
def test_a_spec_that_cannot_be_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be|have come that are none|more than"):
        specs.decode(msgspec.msgpack.encode(replace(ROUNDS, **changed)))


@pytest.mark.parametrize("optimizer", ["builtins:int", "torch.optim:Nothing", "", "a\0:B"])
def test_so_is_an_optimizer_that_is_none(optimizer: str) -> None:
    with pytest.raises(ConfigError):
        hear((HOME, ranges.Attach(2, msgspec.msgpack.encode(replace(ROUNDS, optimizer=optimizer))), b""))


def test_so_is_an_exchange_that_this_server_has_no_part_of() -> None:
    with pytest.raises(ConfigError, match="of 1 servers; this is server 1"):
        hear((HOME, ranges.Attach(2, msgspec.msgpack.encode(replace(ROUNDS, servers=1))), b""))


def test_specs_of_all_kinds_are_taken() -> None:
    for spec in (ROUNDS, LOG):
        assert specs.decode(msgspec.msgpack.encode(spec)) == spec
