"""Claims about reading run directories, whole and damaged."""

import os
import platform
from pathlib import Path

import msgspec
import pytest

from paceline.errors import UsageError
from paceline.events import Epoch, Metric, Notice, Process, RunInfo, Summary
from paceline.report.runs import TAIL_BYTES, find_run, last_notices, list_runs, read_run

INFO = RunInfo(run="a", status="running", argv=["paceline"], seed=0, pace="sync", workers=2, servers=0)
SUMMARY = Summary(
    run="a",
    status="done",
    pace="sync",
    workers=2,
    servers=0,
    steps=100,
    samples=3200,
    seconds=10.0,
    samples_per_s=320.0,
    loss=1.5,
    waiting=0.1,
    bytes_sent=0,
)


def made(folder: Path, name: str, *, steps: int = 0, summary: bool = False) -> Path:
    directory = folder / name
    directory.mkdir(parents=True)
    (directory / "run.json").write_bytes(msgspec.json.encode(INFO))
    rounds = [Metric(step, 1, step / 10, step / 10, 32, 0.1, 0.1, 0.1) for step in range(1, steps + 1)]
    lines = [msgspec.json.encode(each) + b"\n" for each in rounds]
    (directory / "metrics.jsonl").write_bytes(b"".join(lines))
    if summary:
        (directory / "summary.json").write_bytes(msgspec.json.encode(SUMMARY))
    return directory


def test_a_finished_run_is_what_its_summary_says(tmp_path: Path) -> None:
    run = read_run(made(tmp_path, "a", steps=3, summary=True))
    assert (run.status, run.steps, run.loss) == ("done", 100, 1.5)


def test_a_run_still_going_is_where_its_last_whole_line_is(tmp_path: Path) -> None:
    directory = made(tmp_path, "a", steps=3000)
    path = directory / "metrics.jsonl"
    assert path.stat().st_size > TAIL_BYTES
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run(directory)
    assert (run.status, run.steps, run.loss) == ("running", 2999, 299.9)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xff", b'{"run": 3}', b"[]"])
def test_damaged_files_are_unreadable_and_no_error(tmp_path: Path, damage: bytes) -> None:
    directory = made(tmp_path, "a")
    for name in ("run.json", "summary.json", "metrics.jsonl", "events.jsonl"):
        (directory / name).write_bytes(damage)
    (run,) = list_runs(tmp_path)
    assert (run.status, run.steps, run.loss) == ("unreadable", None, None)
    assert last_notices(directory, 5) == []


def test_runs_are_listed_in_the_order_they_were_made(tmp_path: Path) -> None:
    for name in ("20260131-0900-a-sync-10", "20260131-0900-a-sync-2", "20260131-0900-a-sync", "20251231-2300-z"):
        made(tmp_path, name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    assert [run.name for run in list_runs(tmp_path)] == [
        "20251231-2300-z",
        "20260131-0900-a-sync",
        "20260131-0900-a-sync-2",
        "20260131-0900-a-sync-10",
    ]


def test_no_folder_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "absent") == []


def test_a_run_is_found_by_name_path_part_or_as_the_newest(tmp_path: Path) -> None:
    first, second = made(tmp_path, "20260131-0900-text"), made(tmp_path, "20260131-0901-linear")
    made(tmp_path, "20260131-0901-linear-2")
    assert find_run(tmp_path, "text").directory == first
    assert find_run(tmp_path, "20260131-0901-linear").directory == second
    assert find_run(tmp_path / "elsewhere", str(second)).directory == second
    assert find_run(tmp_path, None).name == "20260131-0901-linear-2"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("2026", "could be any of"), ("20260131-0900-tetx", "did you mean '20260131-0900-text'?"), ("zz", "runs list")],
)
def test_a_run_that_is_not_found_is_named(tmp_path: Path, wanted: str, says: str) -> None:
    made(tmp_path, "20260131-0900-text")
    made(tmp_path, "20260131-0901-linear")
    with pytest.raises(UsageError) as raised:
        find_run(tmp_path, wanted)
    assert says in str(raised.value)


def test_only_notices_are_read_from_the_events(tmp_path: Path) -> None:
    records = [Notice(1.0, "join", "a"), Epoch(1.5, 1, 10), Notice(2.0, "leave", "b"), Notice(3.0, "stop", "c")]
    lines = b"".join(msgspec.json.encode(each) + b"\n" for each in records)
    (tmp_path / "events.jsonl").write_bytes(lines + b'{"type": "notice", "ti')
    assert [notice.text for notice in last_notices(tmp_path, 2)] == ["b", "c"]
    assert [notice.text for notice in last_notices(tmp_path, 9)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("pid", "host", "status"),
    [(os.getpid(), platform.node(), "running"), (0, platform.node(), "lost"), (0, "elsewhere", "running")],
    ids=["there", "gone", "elsewhere"],
)
def test_a_run_whose_process_is_gone_is_lost(pid: int, host: str, status: str, tmp_path: Path) -> None:
    """Where that can be seen."""
    directory = made(tmp_path, "a")
    info = msgspec.structs.replace(INFO, processes=[Process("front", 0, pid, host)])
    (directory / "run.json").write_bytes(msgspec.json.encode(info))
    assert read_run(directory).status == status
