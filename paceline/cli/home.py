"""The home of a run whose workers somebody else has started (torchrun): a process of its own, beside rank 0's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from paceline.cli.failure import report
from paceline.cli.options import JobFlags, ShowFlags, resolve, switched
from paceline.cli.run import train
from paceline.config import Job, parse_pace
from paceline.engine.front import run_local
from paceline.engine.program import Elsewhere, Order, Script
from paceline.errors import ConfigError, PacelineError, UsageError
from paceline.events import Record, Summary


def main() -> NoReturn:
    """Be the home that the order on standard input asks for; the exit code is the run's."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    try:
        job = resolved(order)
    except PacelineError as error:
        report(error, sys.stderr)
        sys.exit(error.exit_code)
    if order.insecure:
        sys.stderr.write(
            "paceline: PACELINE_INSECURE is set: links are neither encrypted nor authenticated; whoever reaches the "
            "ports can read and change the training\n"
        )
    script = Script(Path(order.script), tuple(order.args))

    def engine(job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]) -> Summary:
        elsewhere = Elsewhere(
            program.path,
            program.args,
            order.host,
            order.port,
            order.job,
            order.starter,
            order.report,
            order.insecure,
        )
        return run_local(job, elsewhere, watch=watch, argv=argv)

    sys.exit(train(job, script, switched(ShowFlags(), os.environ), engine))


def resolved(order: Order) -> Job:
    """The job: what init was given, before the environment, before a --config file. Raises UsageError, ConfigError."""
    values: dict[str, Any] = dict(resolve(JobFlags(), os.environ).values)
    given = dict(order.options)
    if isinstance(given.get("pace"), str):
        given["pace"] = parse_pace(given["pace"])
    unknown = [name for name in given if name not in {field.name for field in fields(Job)}]
    if unknown:
        raise UsageError(f"paceline.init got {unknown[0]!r}, which is no option of a run")
    values |= given | {"workers": order.workers, "max_workers": order.workers, "restarts": 0}
    job = Job(name=Path(order.script).stem, **values)
    if job.data == "served":
        raise ConfigError(
            "data is served, and workers were started by torchrun: batches are not sent to other hosts yet",
            fix="shared, with the data on every host; or own, with each worker's part with itself",
        )
    if job.checkpoint_every is not None:
        raise ConfigError(
            "checkpoint-every is set, and torchrun has started the workers: such runs cannot be resumed yet",
            fix="save the model in the script: if run.is_main: torch.save(model.state_dict(), ...)",
        )
    return job
