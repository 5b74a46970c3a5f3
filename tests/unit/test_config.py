"""What can be asked for: every pace has a word that says it again, and what is not allowed is answered with what is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paceline.config import (
    ASSIGNMENTS,
    DATA,
    ENGINES,
    MAX_SERVERS,
    MAX_WORKERS,
    PACES,
    Async,
    Bounded,
    Job,
    Local,
    Pace,
    Quorum,
    Sync,
    parse_pace,
)
from paceline.errors import UsageError

APART = {"engine": "ray", "servers_apart": True}
WHOLE = st.integers(1, 2**53)
PACE: st.SearchStrategy[Pace] = st.one_of(
    st.just(Sync()),
    st.integers(1, MAX_WORKERS).map(Quorum),
    st.integers(0, 2**53).map(Bounded),
    WHOLE.map(Async),
    st.builds(
        Local,
        WHOLE,
        st.floats(0, allow_nan=False, allow_infinity=False),
        st.floats(0, 1, exclude_max=True),
    ),
)


# --- words ---


@given(PACE)
@example(Local(8, 0.7, 0.9))
@example(Local(8, 1.0, 0.0))
@example(Local(8, 1e-7, 0.1 + 0.2))
def test_the_word_of_a_pace_is_that_pace(pace: Pace) -> None:
    assert parse_pace(str(pace)) == pace
    assert parse_pace(f" {str(pace).upper()} ") == pace


@pytest.mark.parametrize(
    ("text", "pace"),
    [
        ("sync", Sync()),
        ("quorum:3", Quorum(3)),
        ("bounded", Bounded(3)),
        ("bounded:0", Bounded(0)),
        ("async", Async(1)),
        ("async:1", Async()),
        ("async:10", Async(10)),
        ("local", Local(32, 1.0, 0.0)),
        ("local:8", Local(8)),
        ("local:8:average", Local(8)),
        ("local:8:nesterov", Local(8, 0.7, 0.9)),
        ("local:8:0.5:0.25", Local(8, 0.5, 0.25)),
        ("local:8:1:0", Local(8)),
    ],
)
def test_words_are_read_as_they_are_documented(text: str, pace: Pace) -> None:
    assert parse_pace(text) == pace


def test_the_shortest_word_is_shown() -> None:
    shown = [str(p) for p in (Sync(), Quorum(2), Bounded(), Async(), Async(4), Local(), Local(4, 0.7, 0.9))]
    assert shown == ["sync", "quorum:2", "bounded:3", "async", "async:4", "local:32", "local:4:nesterov"]
    assert str(Local(4, 0.5, 0.25)) == "local:4:0.5:0.25"


def test_every_pace_that_errors_name_is_one() -> None:
    for word in PACES:
        numbered = word.replace(":LR:MOMENTUM", ":0.5:0.5").replace("K", "2").replace("S", "2").replace("H", "2")
        assert str(parse_pace(numbered)) == numbered


@pytest.mark.parametrize("text", ["", "synk", "sync:2", "quorum", "quorum:1:2", "async:2:3", "local:2:fast", "ssp:3"])
def test_an_unknown_pace_is_answered_with_all_there_are(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_pace(text)
    assert repr(text) in raised.value.what
    assert all(word in raised.value.what for word in PACES)


@pytest.mark.parametrize(("text", "fix"), [("asinc", "async"), ("bound:3", "bounded"), ("locale:8", "local")])
def test_a_slip_is_answered_with_the_nearest_word(text: str, fix: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_pace(text)
    assert raised.value.fix == f"did you mean {fix!r}?"


def test_quorum_alone_is_answered_with_how_to_say_how_many() -> None:
    with pytest.raises(UsageError) as raised:
        parse_pace("quorum")
    assert raised.value.fix == "say how many pushes close a round: quorum:3"


@pytest.mark.parametrize("number", ["", "x", "1.5", "-1", "+1", "1_0", "٣", " 2 3"])
@pytest.mark.parametrize("word", ["quorum", "bounded", "async", "local"])
def test_what_is_no_whole_number_is_named(word: str, number: str) -> None:
    with pytest.raises(UsageError, match="where a whole number belongs; for example") as raised:
        parse_pace(f"{word}:{number}")
    assert f"has {number!r} where" in raised.value.what


@pytest.mark.parametrize("numbers", ["fast:0.9", "0.7:", "0,7:0.9"])
def test_what_is_no_number_is_named(numbers: str) -> None:
    with pytest.raises(UsageError, match=r"where a number belongs; for example local:32:0\.7:0\.9"):
        parse_pace(f"local:8:{numbers}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quorum:0", "quorum is 0; it must be 1 or more"),
        ("quorum:257", "quorum is 257; it must be 256 or less"),
        ("async:0", "every is 0; it must be 1 or more"),
        ("local:0", "every is 0; it must be 1 or more"),
        (f"bounded:{2**53 + 1}", f"staleness is {2**53 + 1}; it must be {2**53} or less"),
        ("local:8:-1:0", "outer_lr is -1.0; it must be a number, 0 or more"),
        ("local:8:nan:0", "outer_lr is nan; it must be a number, 0 or more"),
        ("local:8:inf:0", "outer_lr is inf; it must be a number, 0 or more"),
        ("local:8:1:1", "outer_momentum is 1.0; it must be 0 or more and below 1"),
        ("local:8:1:-0.1", "outer_momentum is -0.1; it must be 0 or more and below 1"),
    ],
)
def test_numbers_out_of_range_are_answered_with_the_range(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_pace(text)
    assert raised.value.what == says


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
@pytest.mark.parametrize("kind", [Quorum, Bounded, Async, Local])
def test_counts_are_whole_numbers(kind: Any, value: Any) -> None:
    with pytest.raises(UsageError, match=f"is {value!r}; it must be a whole number"):
        kind(value)


@pytest.mark.parametrize("value", [True, "0.5", None])
def test_the_outer_step_takes_numbers(value: Any) -> None:
    with pytest.raises(UsageError, match=r"outer_lr is .*; it must be a number, 0 or more"):
        Local(8, value)


# --- jobs ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "workers is 0; it must be 1 or more"),
        ({"workers": MAX_WORKERS + 1}, "workers is 257; it must be 256 or less"),
        ({"workers": 2.0}, "workers is 2.0; it must be a whole number"),
        ({"servers": -1}, "servers is -1; it must be 0 or more"),
        ({"servers": MAX_SERVERS + 1}, "servers is 65; it must be 64 or less"),
        ({"threads": 0}, "threads is 0; it must be 1 or more"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"epochs": True}, "epochs is True; it must be a whole number"),
        ({"patience": 0}, "patience is 0; it must be 1 or more"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"until_loss": math.nan}, "until-loss is nan; it must be a number"),
        ({"pace": Async(), "compensate": -0.1}, "compensate is -0.1; it must be a number from 0 to 1e+38"),
        ({"pace": Async(), "compensate": math.inf}, "compensate is inf; it must be a number from 0 to 1e+38"),
        ({"pace": Async(), "compensate": math.nan}, "compensate is nan; it must be a number from 0 to 1e+38"),
        ({"pace": Async(), "compensate": True}, "compensate is True; it must be a number from 0 to 1e+38"),
        ({"compensate": -1.0}, "compensate is -1.0; it must be a number from 0 to 1e+38"),
        ({"port": 65536}, "port is 65536; it must be 65535 or less"),
        ({"return_timeout": 0}, "return-timeout is 0; it must be a number of seconds above 0"),
        (
            {"engine": "ray", "data": "served"},
            "data is served, and workers are started by ray: batches are not sent to other hosts yet",
        ),
        ({"engine": "ray", "servers_apart": True}, "servers-apart is set, and there are no servers"),
        (
            {"servers": 1, "servers_apart": True},
            "servers-apart is for runs on several hosts; all of this one is on this machine",
        ),
        ({"server_hosts": 0}, "server-hosts is 0; it must be 1 or more"),
        (
            {"engine": "ray", "servers": 2, "server_hosts": 2},
            "server-hosts is 2, and servers-apart is not set: no worker is on a host of the servers then",
        ),
        (
            {**APART, "servers": 2, "server_hosts": 3},
            "server-hosts is 3, and there are 2 servers: each host has one at least",
        ),
        (
            {**APART, "servers": 1, "server_hosts": 2},
            "server-hosts is 2, and there is 1 server: each host has one at least",
        ),
        (
            {**APART, "servers": 2, "server_hosts": 2, "max_servers": 3},
            "max-servers is 3, and servers are on 2 hosts, where none are added to a run",
        ),
    ],
)
def test_each_field_is_answered_with_its_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        Job("test", **options)
    assert raised.value.what == says


@pytest.mark.parametrize("pace", [Sync(), Quorum(2), Bounded(), Async(), Async(4), Local()], ids=str)
def test_servers_on_several_hosts_are_for_paces_that_bring_gradients(pace: Pace) -> None:
    options: dict[str, Any] = {**APART, "servers": 5, "pace": pace}
    assert Job("test", **options).server_places == 10
    if isinstance(pace, Async | Local) and pace.every > 1:
        with pytest.raises(UsageError, match=f"pace {pace} brings all parameters home, and servers are on 2 hosts"):
            Job("test", **options, server_hosts=2)
        return
    job = Job("test", **options, server_hosts=2)
    assert (job.server_places, list(job.servers_on(0)), job.servers_elsewhere) == (5, [0, 2, 4], [1, 3])
    assert job.threads_at_home(12, workers=2) == 4
    assert Job("test", **options, server_hosts=2, max_servers=5).server_places == 5


def test_a_quorum_is_of_the_workers_there_are() -> None:
    assert Job("test", workers=3, pace=Quorum(3)).pace == Quorum(3)
    with pytest.raises(UsageError, match="waits for 4 pushes a round; there are 3 workers") as raised:
        Job("test", workers=3, pace=Quorum(4))
    assert raised.value.fix == "--pace quorum:3 at most"


@pytest.mark.parametrize("options", [{"staleness_damping": True}, {"compensate": 0.04}, {"compensate": 0.0}])
@pytest.mark.parametrize("pace", [Sync(), Quorum(1), Bounded(), Async(), Async(4), Local()], ids=str)
def test_what_mends_staleness_is_for_paces_that_have_it(pace: Pace, options: dict[str, Any]) -> None:
    if isinstance(pace, Bounded | Async):
        job = Job("test", pace=pace, **options)
        assert {name: getattr(job, name) for name in options} == options
        return
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(UsageError) as raised:
        Job("test", pace=pace, **options)
    assert raised.value.what == f"{name} is for paces bounded and async; the pace is {pace}"


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("pace", [Sync(), Quorum(1), Bounded(), Async(), Async(4), Local()], ids=str)
def test_samples_are_leased_where_each_push_counts_alone_and_all_have_the_data(pace: Pace, data: str) -> None:
    leased = isinstance(pace, Bounded | Async) and data != "own"
    assert Job("test", pace=pace, data=data).assign == ("lease" if leased else "round_robin")
    if data != "own":
        assert Job("test", pace=pace, data=data, assign="block").assign == "block"
        return
    with pytest.raises(UsageError, match="where each worker has its own part, nothing is dealt out"):
        Job("test", pace=pace, data=data, assign="block")


@pytest.mark.parametrize(("name", "known"), [("assign", ASSIGNMENTS), ("data", DATA), ("engine", ENGINES)])
def test_words_are_answered_with_all_there_are(name: str, known: tuple[str, ...]) -> None:
    for word in known:
        assert getattr(Job("test", **{name: word}), name) == word  # type: ignore[arg-type]
    with pytest.raises(UsageError) as raised:
        Job("test", **{name: known[0][:-1]})  # type: ignore[arg-type]
    assert raised.value.what == f"{name} is {known[0][:-1]!r}; it must be one of: {', '.join(known)}"
    assert raised.value.fix == f"did you mean {known[0]!r}?"
