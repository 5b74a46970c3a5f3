"""The run directory: everything that happens is in a file, whole, and says the same as what a watcher saw."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline import events
from paceline.config import Job
from paceline.engine.launcher.recorder import Recorder, new_directory
from paceline.errors import HostError

Watch = Callable[[events.Record], None]


Make = Callable[..., Recorder]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes recorders of runs in ``tmp_path``; those that a test has not closed are closed behind it."""
    made: list[Recorder] = []

    def record(watch: Watch = lambda record: None, *, runs: Path = tmp_path, **options: Any) -> Recorder:
        def show(file: str, place: int, records: list[events.Record]) -> None:
            for one in records:
                watch(one)

        job = Job(name="text", runs=runs, **options)
        made.append(Recorder(job, new_directory(job), show, ["paceline", "run", "train.py"]))
        return made[-1]

    yield record
    for one in made:
        if not one._metrics.closed:
            one.close("failed", "the test is over", 1, 0.0)


def metric(step: int, **values: Any) -> events.Metric:
    given_ = {"epoch": 1, "time_s": 0.5 * step, "loss": 1.0 / step, "samples": 8}
    durations = {"computing_s": 0.25, "waiting_s": 0.125, "exchanging_s": 0.125}
    return events.Metric(step=step, **(given_ | durations | values))


def lines(path: Path, kind: Any) -> list[Any]:
    return [msgspec.json.decode(line, type=kind) for line in path.read_bytes().splitlines()]


def decoded(path: Path, kind: Any) -> Any:
    return msgspec.json.decode(path.read_bytes(), type=kind)


# --- the directory ---


def test_a_run_has_a_directory_of_its_own_named_by_time_job_and_pace(make: Make, tmp_path: Path) -> None:
    found = [make(runs=tmp_path / "deep" / "runs").directory for _ in range(3)]
    assert len(set(found)) == 3
    assert all(re.fullmatch(r"\d{8}-\d{4}-text-sync(-\d+)?", path.name) for path in found)
    for path in found:
        assert (path / "logs").is_dir()
        assert (path / "plots").is_dir()


def test_nothing_is_written_over_what_is_there(make: Make) -> None:
    first = make()
    first.take(metric(1))
    first.close("done", "", 0, 0.0)
    before = {path: path.read_bytes() for path in first.directory.iterdir() if path.is_file()}
    second = make()
    second.take(metric(1, loss=9.0))
    second.close("failed", "", 1, 0.0)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_place_where_nothing_can_be_made_is_an_error_that_names_it(make: Make, tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError) as caught:
        make(runs=tmp_path / "file" / inside)
    assert str(tmp_path / "file") in caught.value.what
    assert "--run-dir" in caught.value.fix


# --- run.json ---


def test_run_json_tells_what_was_started(make: Make) -> None:
    made = make(workers=3, servers=1, seed=7)
    info = decoded(made.directory / "run.json", events.RunInfo)
    assert (info.status, info.pace, info.workers, info.servers, info.seed) == ("starting", "sync", 3, 1, 7)
    assert info.argv == ["paceline", "run", "train.py"]
    assert info.run == made.directory.name
    assert info.exit_code is None
    assert info.machines[0]["host"]


def test_run_json_is_rewritten_when_something_changes(make: Make) -> None:
    made = make()
    made.info.status = "running"
    made.info.processes.append(events.Process("worker", 0, 77, "here"))
    made.write_info()
    info = decoded(made.directory / "run.json", events.RunInfo)
    assert (info.status, info.processes) == ("running", [events.Process("worker", 0, 77, "here")])
    made.close("failed", "no", 3, 0.0)
    info = decoded(made.directory / "run.json", events.RunInfo)
    assert (info.status, info.exit_code) == ("failed", 3)


def test_processes_of_one_run_are_not_those_of_another(make: Make) -> None:
    one, other = make(), make()
    one.info.processes.append(events.Process("worker", 0, 77, "here"))
    assert other.info.processes == []


def test_a_reader_never_sees_half_a_file(make: Make) -> None:
    """A file is written beside and put in its place: whoever has it open goes on reading the old one."""
    made = make()
    with (made.directory / "run.json").open("rb") as old:
        made.info.status = "running"
        made.write_info()
        assert msgspec.json.decode(old.read(), type=events.RunInfo).status == "starting"
    assert sorted(path.name for path in made.directory.glob("*.tmp")) == []


# --- records ---


def test_each_record_goes_to_its_file_and_all_to_the_watcher(make: Make) -> None:
    seen: list[events.Record] = []
    made = make(seen.append)
    records: list[events.Record] = [
        events.Started("runs/x", []),
        events.Wrapped(0.1, 1000, 4000, "AdamW"),
        events.Epoch(0.2, 1, 10),
        metric(1),
        events.Output("hello\n"),
        metric(2, values={"accuracy": 0.5}),
        events.Notice(0.3, "leave", "worker 1 has finished", "worker", 1),
    ]
    for record in records:
        made.take(record)
    summary = made.close("done", "2 steps done", 0, 0.0)
    assert seen == [*records, summary]
    assert lines(made.directory / "metrics.jsonl", events.Metric) == [records[3], records[5]]
    told = lines(made.directory / "events.jsonl", events.Wrapped | events.Epoch | events.Notice)
    assert told == [records[1], records[2], records[6]]
    assert decoded(made.directory / "summary.json", events.Summary) == summary


def test_events_are_on_disk_at_once_and_metrics_when_flushed(make: Make) -> None:
    made = make()
    made.take(events.Notice(0.1, "stop", "now"))
    assert len(lines(made.directory / "events.jsonl", events.Notice)) == 1
    made.take(metric(1))
    made.flush()
    assert len(lines(made.directory / "metrics.jsonl", events.Metric)) == 1
    made.flush()


def test_many_metrics_reach_the_disk_without_being_asked(make: Make) -> None:
    made = make()
    for step in range(1, 2001):
        made.take(metric(step))
    assert len((made.directory / "metrics.jsonl").read_bytes().splitlines()) > 1000


VALUES = st.dictionaries(st.text(max_size=5), st.floats(), max_size=3)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])  # each makes a run of its own
@given(st.lists(st.tuples(st.floats() | st.none(), VALUES), max_size=5))
def test_whatever_was_logged_can_be_read_again(make: Make, logged: list[Any]) -> None:
    """Not every number has a form in JSON: a loss that is no number must not make its line unreadable."""
    made = make()
    for step, (loss, values) in enumerate(logged, start=1):
        made.take(metric(step, loss=loss, values=values))
    made.close("done", "", 0, 0.0)
    read = lines(made.directory / "metrics.jsonl", events.Metric)
    assert [one.step for one in read] == list(range(1, len(logged) + 1))
    for one, (loss, values) in zip(read, logged, strict=True):
        if loss is not None and math.isfinite(loss):
            assert one.loss == loss
        for name, value in values.items():
            if math.isfinite(value):
                assert one.values[name] == value
    assert decoded(made.directory / "summary.json", events.Summary).steps == len(logged)


def test_files_are_json_for_any_reader(make: Make) -> None:
    made = make()
    made.take(metric(1, loss=math.nan, values={"a": math.inf}))
    made.close("done", "", 0, 0.0)
    for name in ("run.json", "summary.json"):
        json.loads((made.directory / name).read_text())
    for line in (made.directory / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


# --- the summary ---


def test_the_summary_adds_up(make: Make) -> None:
    made = make(workers=2, servers=1)
    for step in range(1, 11):
        made.take(metric(step, epoch=1 + step // 6, bytes_sent=100, loss=float(step)))
    summary = made.close("done", "10 steps done", 0, begun_s=1.0)
    assert summary == events.Summary(
        run=str(made.directory),
        status="done",
        pace="sync",
        workers=2,
        servers=1,
        steps=10,
        samples=80,
        seconds=4.0,  # from the first batch at 1.0 to the last step at 5.0
        samples_per_s=20.0,
        loss=10.0,
        waiting=0.25,
        bytes_sent=1000,
        epochs=2,
        reason="10 steps done",
        exit_code=0,
    )


def test_the_loss_of_a_run_is_the_mean_of_its_last_twentieth(make: Make) -> None:
    made = make()
    for step in range(1, 101):
        made.take(metric(step, loss=float(step)))
    assert made.close("done", "", 0, 0.0).loss == 98.0  # 96 to 100


def test_rounds_without_a_loss_do_not_count_for_it(make: Make) -> None:
    made = make()
    for step in range(1, 41):
        made.take(metric(step, loss=float(step) if step <= 20 else None))
    summary = made.close("done", "", 0, 0.0)
    assert (summary.steps, summary.loss) == (40, 20.0)


def test_a_run_without_a_step_has_a_summary_too(make: Make) -> None:
    made = make()
    summary = made.close("failed", "worker 0 raised", 1, begun_s=0.0)
    assert (summary.steps, summary.seconds, summary.samples_per_s, summary.waiting, summary.loss) == (0, 0, 0, 0, None)
    assert (summary.status, summary.reason, summary.exit_code) == ("failed", "worker 0 raised", 1)


def test_a_run_given_up_says_so_in_its_files_and_to_no_watcher(make: Make) -> None:
    seen: list[events.Record] = []
    made = make(seen.append)
    made.take(metric(1))
    made.flush()
    made.abandon("BrokenPipeError(32)")
    assert seen == [metric(1)]
    summary = decoded(made.directory / "summary.json", events.Summary)
    assert (summary.status, summary.reason, summary.steps) == ("failed", "BrokenPipeError(32)", 1)
    assert decoded(made.directory / "run.json", events.RunInfo).status == "failed"


# --- going on ---


def going_on(directory: Path, **options: Any) -> Recorder:
    return Recorder(Job(name="text"), directory, lambda file, place, records: None, [], **options)


@pytest.mark.parametrize("torn", ["", '{"step"', "x" * 70_000, "x" * 140_000])
def test_who_takes_over_counts_what_was_written_whole(make: Make, torn: str) -> None:
    made = make()
    for step in range(1, 11):
        made.take(metric(step))
    made.take(events.Notice(0.3, "died", "worker 1 was killed"))
    files = [made.directory / name for name in ("metrics.jsonl", "events.jsonl")]
    whole = [file.read_bytes() for file in files]
    for file in files:
        with file.open("a") as end:
            end.write(torn)
    again = going_on(made.directory, again=True)
    assert [file.read_bytes() for file in files] == whole
    again.take(metric(11))
    other = make()
    for step in range(1, 12):
        other.take(metric(step))
    theirs = other.close("done", "", 0, 0.0)
    assert again.close("done", "", 0, 0.0) == msgspec.structs.replace(theirs, run=str(made.directory))


def test_who_takes_over_before_a_line_was_whole_begins_at_the_start(make: Make) -> None:
    made = make()
    (made.directory / "metrics.jsonl").write_bytes(b"x" * 70_000)
    again = going_on(made.directory, again=True)
    assert (made.directory / "metrics.jsonl").read_bytes() == b""
    assert again.close("done", "", 0, 0.0).steps == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_resumed_goes_on_where_its_clock_stood(make: Make, again: bool) -> None:
    """``again``: the resumed run's launcher was killed after two more steps."""
    made = make()
    for step in range(1, 11):
        made.take(metric(step))
    made.flush()
    resumed = going_on(made.directory, resume=6)
    assert [one.step for one in lines(made.directory / "metrics.jsonl", events.Metric)] == [1, 2, 3, 4, 5, 6]
    for step in (7, 8) if again else ():
        resumed.take(metric(step))
    resumed.flush()
    last = going_on(made.directory, resume=6, again=True) if again else resumed
    assert last.offset_s == 3.0
    summary = last.close("done", "", 0, 3.25)
    if again:
        resumed.close("done", "", 0, 3.25)
    assert summary.steps == (8 if again else 6)
    assert summary.seconds == 2.5 + (0.75 if again else 0.0)  # of steps 1 to 6, and since then
