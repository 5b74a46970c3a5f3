"""What workers on other hosts, and deputies, may say that can be decoded and yet cannot be: it is refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.engine.elsewhere.mail import Mail, send, without_values
from paceline.engine.elsewhere.making import make
from paceline.engine.elsewhere.peers import ROLE, Peers
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.params import optimizers
from paceline.params.packing import unpack
from paceline.protocol import mirrors, owners, remote
from paceline.protocol.link import Peer, Senseless
from paceline.transport.ends import Joined
from tests import fuzz_said
from tests.driver import run_job

# --- owners ---


def said(sender: int, message: owners.Said, payload: bytes = b"") -> bytes:
    return msgspec.msgpack.encode([fuzz_said.Saying(sender, payload, msgspec.msgpack.encode(message))])


@pytest.mark.parametrize(
    ("message", "payload", "why"),
    [
        (owners.Part(0, 1, 7), bytes(128), "nobody expects"),
        (owners.Part(0, 1, 0), bytes(124), "nobody expects"),
        (owners.Part(0, 1, 1), bytes(128), "nobody expects"),
        (owners.Part(0, 1, 0), b"", "without values"),
        (owners.Part(0, 1, 2**61), b"", "without values"),
        (owners.Fold(0, 1, 0), b"", "without values"),
        (owners.Rows(0, 1, 0, 2, 0, True), b"", "no table"),
        (owners.Rows(0, 1, 1, 5, 0, True), b"", "5 rows have come of a table of 4"),
        (owners.Rows(0, 1, 1, -(2**61), 0, True), b"", "of a table of 4"),
        (owners.Rows(0, 1, 1, 2, 0, True), b"", "only some have come"),
        (owners.Rows(0, 1, 1, 2, 2**61, True), bytes(8), "nobody expects"),
        (owners.Rows(0, 1, 1, -1, 0, True), b"\4" + bytes(31), "row 4 has come of a table of 4"),
        (owners.Rows(0, 1, 1, 1, 0, True), b"\xff" * 4 + bytes(28), "row -1 has come of a table of 4"),
        (owners.Letter(0, 1, [owners.Enclosed(owners.Part(0, 1, 0), bytes(124))]), b"", "which are not expected"),
        (owners.Letter(0, 1, [owners.Enclosed(owners.Given(0, 1), bytes(8))]), b"", "which are not expected"),
        (owners.Letter(0, 1, [owners.Enclosed(owners.Part(0, 1, 0), b"")]), b"", "without values"),
        (owners.Letter(0, 1, []), bytes(8), "nobody expects"),
    ],
    ids=str,
)
def test_what_an_owner_is_sent_that_cannot_be_ends_the_link(message: owners.Said, payload: bytes, why: str) -> None:
    with pytest.raises(Senseless, match=why):
        fuzz_said.HeardByOwners()(said(1, message, payload))


@pytest.mark.parametrize("peer", [Peer(7, ROLE), Peer(1, "worker")])
def test_a_stranger_is_no_peer(peer: Peer) -> None:
    link: Any = SimpleNamespace(peer=peer)
    mine = Peers.__new__(Peers)
    mine.rank, mine.others, mine._links = 0, [1, 2], {}
    with pytest.raises(Senseless, match="none of the first workers of all hosts"):
        mine._sink(Joined(link))
    assert not mine._links


# --- arrays and documents ---


def place(mail: Mail, what: str, start: int, total: int, size: int) -> memoryview | None:
    link: Any = None
    return mail.place(link, remote.Piece(what, start, total), size)


def test_what_is_claimed_of_arrays_is_bounded_in_all() -> None:
    mail = Mail(100)
    assert place(mail, "a", 0, 101, 1) is None
    assert place(mail, "a", 0, 60, 8) is not None
    assert place(mail, "b", 0, 41, 8) is None
    assert place(mail, "b", 0, 40, 8) is not None
    assert place(mail, "a", 0, 61, 8) is None
    assert place(mail, "a", 0, 50, 8) is not None  # in place of what was there
    mail.take("b", torch.uint8)
    assert place(mail, "c", 0, 50, 8) is not None
    assert place(Mail(2**62), "a", 0, 2**61, 8) is None  # more than there is


@pytest.mark.parametrize(
    ("start", "total", "size"), [(0, 8, 8), (8, 16, 16), (0, 16, 17), (2**40, 16, 8), (0, 2**40, 16)]
)
def test_what_is_enclosed_and_nobody_expects_is_refused_by_name(start: int, total: int, size: int) -> None:
    mail, gradient = Mail(100), torch.zeros(4)
    mail.expect("gradient/0/float32", gradient)
    letter = remote.Letter([remote.Enclosed("gradient/0/float32", start, total, bytes([1]) * size)])
    with pytest.raises(Senseless, match="of gradient/0/float32 are enclosed, which nobody expects"):
        mail.open(letter)
    assert not gradient.any()


@pytest.mark.parametrize(("dtype", "shape"), [(torch.int64, (-1,)), (torch.float32, (2, 2)), (torch.float32, ())])
def test_an_array_of_another_size_is_refused_by_name(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mail = Mail()
    place(mail, "value/0", 0, 12, 12)
    with pytest.raises(ConfigError, match="value/0 came as 12 bytes"):
        mail.take("value/0", dtype, shape)


@pytest.mark.parametrize(
    "told",
    [
        3,
        [{}],
        [{}, {"a": ("float32", [-1])}],
        [{}, {"a": ("object", [1])}],
        [{"0": {"$": "tensor", "key": "b"}}, {}],
        [{"0": {"$": "float", "is": "a"}}, {}],
        [{"0": {"a": {"$": "pairs", "is": [[[], 1]]}}}, {}],
        [{"1": {}}, {}],
        [{"0": 1}, {}],
        [[], {}],
    ],
    ids=str,
)
def test_a_document_that_is_none_is_refused(told: Any) -> None:
    with pytest.raises(ConfigError):
        Mail().take_states("state", told, [nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError):
        without_values("state", told, [nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("shape", [[2**40], [2**61, 2**61], [2**61, 0, 2**61]], ids=str)
def test_a_state_without_values_has_a_size_that_can_be(shape: list[int]) -> None:
    with pytest.raises(ConfigError, match="takes more than 256 GB"):
        without_values("state", [{}, {"a": ("float32", shape)}], [])


@pytest.mark.parametrize("dtype", ["O", "V8", "i8,i8", "nothing"])
def test_an_array_is_of_numbers(dtype: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        unpack({"$": "array", "key": "a", "dtype": dtype}, {"a": torch.zeros(8, dtype=torch.uint8)})


def wrap(*parameters: remote.Parameter, settings: bytes = b"\x91\x80", optimizer: str = "torch.optim.sgd:SGD") -> None:
    make(remote.WrapOptimizer(optimizer, settings, list(parameters), None, b""))


@pytest.mark.parametrize(
    "call",
    [
        lambda: wrap(remote.Parameter("w", (2**40,), (1,), "float32", 0, False)),
        lambda: wrap(remote.Parameter("w", (2,), (2**61,), "float32", 0, False)),
        lambda: wrap(remote.Parameter("w", (2,), (1, 1), "float32", 0, False)),
        lambda: wrap(remote.Parameter("w", (-2,), (1,), "float32", 0, False)),
        lambda: wrap(remote.Parameter("w", (2,), (1,), "object", 0, False)),
        lambda: wrap(remote.Parameter("w", (2,), (1,), "float32", 1, False)),
        lambda: wrap(settings=b"\x01"),
        lambda: wrap(settings=b""),
        lambda: wrap(optimizer=""),
        lambda: wrap(optimizer=".a:B"),
        lambda: wrap(optimizer="a\0:B"),
        lambda: wrap(optimizer="builtins:int"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(call: Callable[[], None]) -> None:
    with pytest.raises(ConfigError):
        call()


def test_settings_are_of_as_many_groups() -> None:
    with pytest.raises(ConfigError, match="settings of 2 groups are not for 1"):
        optimizers.load_settings(optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), [{}, {}])


@pytest.mark.parametrize(
    ("sources", "settings", "why"),
    [
        ([], b"", "pushed"),
        ([(2, 1.0, 1.0, b"")], b"", "workers [2] of 2"),
        ([(0, 1.0, 1.0, b""), (0, 1.0, 1.0, b"")], b"", "workers [0, 0] of 2"),
        ([(0, 1.0, 1.0, b"\1")], b"", "1 gradients for 3"),
        ([(0, 1.0, 1.0, b"\1\1\1")], bytes(9), "9 bytes in room for 8"),
    ],
)
def test_a_mirror_is_not_stepped_with_what_cannot_be(sources: Any, settings: bytes, why: str) -> None:
    found = mirrors.mistaken(mirrors.Follow(1, 0, sources, settings), 2, 3, 8)
    assert found is not None
    assert why in found


@pytest.mark.parametrize(
    "message",
    [[1, -1, 0], [1, 2**62, 0], [6, 0, 1, 0, -(2**62), 0, True], [6, 0, 1, 0, 2, -8, True]],
    ids=str,
)
def test_numbers_are_in_their_range(message: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=owners.Any_)


# --- a deputy, asked by its worker; a worker, told by its deputy ---

ABSURD: dict[str, Any] = {
    "there is no loader 9": remote.Begin(9, 3, True, 0),
    "no pass of loader 9 has begun": remote.More(9),
    "no pass of loader 0 has begun": remote.End(0, True, 0),
    "no pass of loader 0 is drawn by lease": remote.DrawLease(0, 3, 0, True),
    "no pass of loader 1 is drawn by lease": remote.BeginLease(1),
    "no pass of loader 2 is drawn by lease": remote.DropLease(2),
    "there is no loader 3": remote.NeedsGhost(3),
    "there is no exchange 4": remote.ShowState(4),
    "there is no store 5": remote.PullStore(5, 0),
    "9 gradients have come": remote.Step(0, False, b"\1" * 9, {}, b""),
    "a norm is asked of 3 parameters": remote.Norm(0, b"", {}, b"\1\1\1", 2.0),
    "settings have come that are none": remote.Step(0, False, b"", {}, b"\xc1"),
    "a table has come that is none": remote.CopyFirst(b"\xc1"),
    "folds what it brings with workers [7]": remote.WrapOptimizer(
        "torch.optim.sgd:SGD", b"\x91\x80", [], None, b"", members=[7]
    ),
}


@pytest.mark.parametrize("why", ABSURD)
def test_a_deputy_refuses_what_cannot_be_in_words(why: str) -> None:
    def body(run: Any) -> str:
        net = nn.Linear(2, 1)
        net, _, _ = run.wrap(
            net, optim.SGD(net.parameters(), lr=0.1), DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2)
        )
        with pytest.raises(PacelineError) as refused:
            run.worker.ask(ABSURD[why])
        return str(refused.value)

    (said,) = run_job(body, workers=1, elsewhere=True)
    assert why in said


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize(
    ("numbers", "values", "told", "why"),
    [
        ([3, 8], 2, -2, "row 8 of weight has come"),
        ([-4, 3], 1, -2, "row -4 of weight has come|2 rows and 1 of values"),
        ([3, -9, 2], 2, -3, "row -9 of weight has come"),
        ([3, -3], 1, 2, "row -3 of weight has come|2 rows and 1 of values"),
        ([3, 2], 2, -9, "9 rows have come of a table of 8"),
    ],
)
def test_it_refuses_rows_that_a_table_has_not(
    numbers: list[int], values: int, told: int, why: str, finite: bool
) -> None:
    def body(run: Any) -> str:
        table = nn.EmbeddingBag(8, 2, sparse=True)
        table, _ = run.wrap(table, optim.SGD(table.parameters(), lr=0.1))
        if not run.rank:
            return ""
        send(run.worker._link, "numbers/0/0", torch.tensor(numbers))
        send(run.worker._link, "values/0/0", torch.zeros(values, 2))
        with pytest.raises(ConfigError) as refused:
            run.worker.ask(remote.Step(0, False, b"\1", {0: told}, b"", finite=finite))
        return str(refused.value)

    assert re.search(why, run_job(body, workers=2, elsewhere=True, hosts=["", "b"])[1])


@pytest.mark.parametrize("note", [remote.Fetched(0), remote.Drawn(5, 1), remote.Left(0, 1), remote.Dropped(3, True)])
def test_so_it_does_with_notes(note: remote.Note) -> None:
    def body(run: Any) -> str:
        net = nn.Linear(2, 1)
        net, _, _ = run.wrap(
            net, optim.SGD(net.parameters(), lr=0.1), DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2)
        )
        run.worker.note(note)
        with pytest.raises(ConfigError) as refused:
            run.worker.ask(remote.Barrier())
        return str(refused.value)

    (said,) = run_job(body, workers=1, elsewhere=True)
    assert re.search("there is no (loader|exchange)|has begun", said)


@pytest.mark.parametrize(
    "status",
    [
        remote.Status(fresh={1: []}),
        remote.Status(fresh={-1: []}),
        remote.Status(fresh={0: [5]}),
        remote.Status(brought={1: mirrors.Brought(1, 0, True)}),
        remote.Status(apart=[3]),
        remote.Status(follow={0: mirrors.Follow(1, 0, [], b"")}),
    ],
    ids=str,
)
def test_a_worker_ends_in_words_where_home_tells_it_what_cannot_be(status: remote.Status) -> None:
    def body(run: Any) -> bool:
        net = nn.Linear(2, 1)
        net, _ = run.wrap(net, optim.SGD(net.parameters(), lr=0.1))
        before = run.worker.status
        with pytest.raises((HostError, ConfigError)):
            run.worker._take_status(status)
        run.worker._status = before
        return True

    assert run_job(body, workers=1, elsewhere=True, hosts=("b",)) == [True]


@pytest.mark.parametrize("weights", [[], [1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0]])
def test_a_fold_that_nobody_can_make_is_refused(weights: list[float]) -> None:
    def body(run: Any) -> bool:
        net = nn.Linear(2, 1)
        net, _ = run.wrap(net, optim.SGD(net.parameters(), lr=0.1))
        worker = run.worker
        with pytest.raises(HostError, match="asks for a fold"):
            worker._host.heed(remote.SendFold(0, 1, weights), worker.exchanges[0])
        return True

    assert run_job(body, workers=1, elsewhere=True) == [True]
