"""The diary: what was written whole is read again, wherever its writer was killed; shortened it means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.engine.launcher.diary import Diary, Entry, without_rows
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
            elif one.role == "worker" and not isinstance(message, messages.Logged):
                effects += coordinator.handle(Came("worker", one.rank, message))
    return effects


@given(ENTRIES, st.integers(0, 40), st.integers(0, 2))
def test_shortened_anywhere_it_leads_to_the_same(entries: list[Entry], cut: int, restarts: int) -> None:
    whole, other = (Coordinator(3, 2, restarts=restarts, min_workers=1) for _ in range(2))
    heard(whole, entries[:cut])
    heard(other, without_rows([BEGIN, *entries[:cut]], saved=0)[1:])
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
    assert again.entries == entries[:kept]
    again.append(BEGIN)
    again.close()
    last = Diary(path)
    assert last.entries == [*entries[:kept], BEGIN]
    last.close()


def test_shortened_it_keeps_what_the_merger_knew(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    for one in (BEGIN, *[entry("worker", 0, messages.Steps(bytes(104)))] * 50):
        diary.append(one)
    long_bytes = diary.size_bytes
    diary.shorten(b"merged", saved=0)
    diary.append(entry("worker", 0, messages.Finished()))
    assert diary.size_bytes < long_bytes / 5
    diary.close()
    again = Diary(tmp_path / "diary")
    assert [one.merged for one in again.entries[-2:]] == [b"merged", b""]
    assert [message for one in again.entries for message in one.messages if isinstance(message, messages.Finished)]
    again.close()
