"""An engine that plays a run's records from a list and writes the files a run leaves: for the tests of the CLI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from paceline.config import Job
from paceline.engine.program import Script
from paceline.errors import PacelineError
from paceline.events import Epoch, Metric, Output, Record, RunInfo, Started, Summary, Wrapped


def metric(step: int, *, loss: float | None = 2.0, time_s: float | None = None, samples: int = 32) -> Metric:
    return Metric(
        step=step,
        epoch=1,
        time_s=step / 10 if time_s is None else time_s,
        loss=loss,
        samples=samples,
        computing_s=0.08,
        waiting_s=0.015,
        exchanging_s=0.005,
    )


def summary(job: Job, directory: Path, status: str = "done", steps: int = 20, exit_code: int = 0) -> Summary:
    return Summary(
        run=str(directory),
        status=status,
        pace=str(job.pace),
        workers=job.workers,
        servers=job.servers,
        steps=steps,
        samples=steps * 32,
        seconds=steps / 10,
        samples_per_s=320.0,
        loss=2.0 if steps else None,
        waiting=0.15,
        bytes_sent=0,
        exit_code=exit_code,
    )


class Played:
    """Plays ``steps`` rounds with what the script ``said``, and fails at the end if it is told to.

    Remembers the jobs and programs that it was asked to run; ``speeds`` are samples a round of 0.1 s, by
    the number of workers.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        said: Sequence[str] = (),
        failure: PacelineError | None = None,
        speeds: dict[int, int] | None = None,
    ) -> None:
        self.steps, self.said, self.failure, self.speeds = steps, said, failure, speeds or {}
        self.jobs: list[Job] = []
        self.programs: list[Script] = []

    def __call__(self, job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]) -> Summary:
        self.jobs.append(job)
        self.programs.append(program)
        directory = job.runs / f"20260131-090{len(self.jobs)}-{job.name}-{job.pace}"
        (directory / "plots").mkdir(parents=True)
        info = RunInfo(
            run=directory.name,
            status="running",
            argv=list(argv),
            seed=job.seed,
            pace=str(job.pace),
            workers=job.workers,
            servers=job.servers,
        )
        (directory / "run.json").write_bytes(msgspec.json.encode(info))
        rounds = [metric(step, samples=self.speeds.get(job.workers, 32)) for step in range(1, self.steps + 1)]
        lines = b"".join(msgspec.json.encode(each) + b"\n" for each in rounds)
        (directory / "metrics.jsonl").write_bytes(lines)
        watch(Started(str(directory), []))
        watch(Wrapped(0.0, 1_600_000, 6_400_000, "AdamW"))
        watch(Epoch(0.0, 1, self.steps))
        for each in rounds:
            watch(each)
        for text in self.said:
            watch(Output(text))
        status = "done"
        if self.failure is not None:
            status = "interrupted" if self.failure.exit_code == 130 else "failed"
        code = self.failure.exit_code if self.failure is not None else 0
        end = summary(job, directory, status, self.steps, code)
        (directory / "summary.json").write_bytes(msgspec.json.encode(end))
        watch(end)
        if self.failure is not None:
            raise self.failure
        return end
