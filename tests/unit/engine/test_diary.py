"""The diary: what was written whole is read again, wherever its writer was killed; shortened it means the same."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from paceline.engine.launcher.diary import LONG_BYTES, Diary, Entry, without_rows
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.effects import (
    Came,
    Died,
    Effect,
)
from paceline.transport.frame import encode

RANKS = st.integers(0, 2)
FROM_WORKERS = st.one_of(
    st.just(messages.Steps(b"rows")),
    st.just(messages.Logged(1, {"a": 1.0})),
    st.just(messages.LoggedBehind(1, 0.5, 4, {"a": 1.0})),
    st.builds(messages.Wrap, st.integers(1, 3), st.just("copy"), st.just(b""), st.just(1), st.just("w")),
    st.just(messages.Finished()),
    st.just(messages.Failed("ScriptError", "worker 1 raised ValueError: no")),
)
EXITS = st.builds(messages.Exited, st.just("worker"), RANKS, st.just(9), st.sampled_from([0, 1, -9]))
SERVERS = st.builds(messages.Exited, st.just("server"), st.integers(0, 1), st.just(9), st.just(-9))


def entry(role: str, rank: int, message: Any) -> Entry:
    return Entry(0.5, role, rank, encode(message))


ENTRIES = st.lists(
    st.one_of(
        st.builds(entry, st.just("worker"), RANKS, FROM_WORKERS),
        st.builds(entry, st.just("zygote"), st.just(0), EXITS | SERVERS),
    ),
    max_size=40,
)
BEGIN = entry("front", 0, messages.Begin(b"", "runs/a", [], 1))


def heard(coordinator: Coordinator, entries: list[Entry]) -> list[Effect]:
    """What follows from these, as the launcher tells its coordinator."""
    effects: list[Effect] = []
    for one in entries:
        for message in one.messages:
            if isinstance(message, messages.Exited):
                effects += coordinator.handle(Died(message.role, message.rank, message.pid, message.status))
            elif one.role == "worker" and not isinstance(message, messages.Logged | messages.LoggedBehind):
                effects += coordinator.handle(Came("worker", one.rank, message))
    return effects


@given(ENTRIES, st.integers(0, 40), st.integers(0, 2))
def test_shortened_anywhere_it_leads_to_the_same(entries: list[Entry], cut: int, restarts: int) -> None:
    whole, other = (Coordinator(3, 2, restarts=restarts, min_workers=1) for _ in range(2))
    heard(whole, entries[:cut])
    heard(other, list(without_rows([BEGIN, *entries[:cut]], saved=0))[1:])
    assert heard(other, entries[cut:]) == heard(whole, entries[cut:])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(ENTRIES, st.data())
def test_cut_short_it_has_what_was_written_whole(tmp_path: Path, entries: list[Entry], data: st.DataObject) -> None:
    path = tmp_path / "diary"
    path.unlink(missing_ok=True)
    diary, ends = Diary(path), [0]
    for one in entries:
        diary.append(one)
        ends.append(diary.size_bytes)
    diary.close()
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    again = Diary(path)
    kept = sum(end <= cut for end in ends) - 1
    assert list(again.read()) == entries[:kept]
    assert again.first == (entries[0] if kept else None)
    again.append(BEGIN)
    again.close()
    last = Diary(path)
    assert list(last.read()) == [*entries[:kept], BEGIN]
    last.close()


STEPS = entry("worker", 0, messages.Steps(bytes(104)))


def test_shortened_it_keeps_what_the_merger_knew(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    for one in (BEGIN, *[STEPS] * 50):
        diary.append(one)
    long_bytes = diary.size_bytes
    diary.shorten(b"merged", saved=0)
    diary.append(entry("worker", 0, messages.Finished()))
    assert diary.size_bytes < long_bytes / 5
    diary.close()
    again = Diary(tmp_path / "diary")
    assert [one.merged for one in list(again.read())[-2:]] == [b"merged", b""]
    assert [message for one in again.read() for message in one.messages if isinstance(message, messages.Finished)]
    again.close()


@pytest.mark.parametrize("entries", [[BEGIN], [BEGIN, STEPS, entry("zygote", 0, messages.Exited("worker", 1, 9, -9))]])
def test_shortened_by_who_takes_over_it_says_how_far_the_files_were_written(
    tmp_path: Path, entries: list[Entry]
) -> None:
    diary = Diary(tmp_path / "diary")
    for number, one in enumerate(entries):
        diary.append(structs.replace(one, time_s=float(number), places={"metrics": number}))
    diary.close()
    for _ in range(2):
        again = Diary(tmp_path / "diary")
        again.shorten(b"merged", saved=0)
        again.close()
    again = Diary(tmp_path / "diary")
    *_, last = again.read()
    again.close()
    assert (last.time_s, last.places) == (len(entries) - 1.0, {"metrics": len(entries) - 1})


def test_killed_while_it_shortens_it_is_as_before(tmp_path: Path) -> None:
    """The new one is written beside it, and is nobody's until it is whole."""
    path = tmp_path / "diary"
    diary = Diary(path)
    for one in (BEGIN, *[STEPS] * 50):
        diary.append(one)
    diary.close()
    whole = path.read_bytes()
    path.with_suffix(".new").write_bytes(whole[:100])
    again = Diary(path)
    assert list(again.read()) == [BEGIN, *[STEPS] * 50]
    assert [file.name for file in tmp_path.iterdir()] == ["diary"]
    again.shorten(b"merged", saved=0)
    again.close()
    assert [file.name for file in tmp_path.iterdir()] == ["diary"]


def test_it_is_read_and_shortened_an_entry_at_a_time(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    rows = entry("worker", 0, messages.Steps(bytes(30_000)))
    diary.append(BEGIN)
    for _ in range(300):
        diary.append(rows)
    diary.close()
    tracemalloc.start()
    try:
        again = Diary(tmp_path / "diary")
        read = sum(len(one.frames) for one in again.read())
        again.shorten(b"merged", saved=0)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    again.close()
    assert read > 9_000_000
    assert most < 1_000_000


def test_what_cannot_be_left_out_is_not_gone_through_at_every_turn(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    wrap = entry("worker", 0, messages.Wrap(1, "exchange", bytes(LONG_BYTES // 4), 1, "w"))
    diary.append(BEGIN)
    assert _until_long(diary, wrap) == 4
    diary.shorten(b"", saved=0)
    assert diary.size_bytes > LONG_BYTES
    assert _until_long(diary, wrap) in (4, 5)
    diary.close()


def _until_long(diary: Diary, one: Entry) -> int:
    """How often it was appended."""
    count = 0
    while not diary.is_long:
        diary.append(one)
        count += 1
    return count
