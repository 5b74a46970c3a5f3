"""The home of a run whose workers somebody else has started (torchrun): a process of its own, beside rank 0's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from paceline.cli.failure import report
from paceline.cli.options import JobFlags, ShowFlags, resolve, switched
from paceline.cli.resume import asked_for, directory_of, tell
from paceline.cli.run import train
from paceline.config import Job, parse_pace
from paceline.engine.launcher.front import run_local
from paceline.engine.program import STARTED, Elsewhere, Order, Script
from paceline.errors import PacelineError, UsageError
from paceline.events import Record, Started, Summary
from paceline.run.doors import hold_ports, own_address, told, warn_insecure

if TYPE_CHECKING:
    from paceline.cli.console import Console


def main() -> NoReturn:
    """Be the home that the order on standard input asks for; the exit code is the run's."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    sys.exit(_run(order))


def _run(order: Order) -> int:
    try:
        script = Script(Path(order.script), tuple(order.args))
        job = resolved(order)
        resume = asked_for(os.environ, script.path, job.runs)
        if resume is not None:
            job = resolved(order, directory_of(resume) / "config.toml")
        place = own_address(job.interface) if job.interface is not None else None
        host = order.host if place is None else place.address
        held = hold_ports(host, job.port, job.places)
    except PacelineError as error:
        report(error, sys.stderr)
        return error.exit_code
    ports = tuple(sock.getsockname()[1] for sock in held)
    os.write(order.report, f"{host} {job.servers_apart:d} {' '.join(map(str, ports))}\n".encode())
    if job.insecure:
        warn_insecure()

    def engine(job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]) -> Summary:
        elsewhere = Elsewhere(
            program.path, program.args, host, ports, order.job, order.starter, order.report, job.insecure
        )

        def seen(record: Record) -> None:
            if isinstance(record, Started):
                with contextlib.suppress(BrokenPipeError):
                    os.write(order.report, f"{STARTED} {Path(record.directory).resolve()}\n".encode())
            watch(record)

        return run_local(job, elsewhere, watch=seen, argv=argv, resume=resume)

    def before(console: Console) -> None:
        if resume is not None:
            tell(resume, console)
        console.say(told(host, "where MASTER_ADDR is" if place is None else place.reason, held, insecure=job.insecure))

    return train(job, script, switched(ShowFlags(), os.environ), engine, before=before)


def resolved(order: Order, config: Path | None = None) -> Job:
    """The job: what init was given, before the environment, before a config file: this one, or that of PACELINE_CONFIG.
    Raises UsageError, ConfigError."""
    values: dict[str, Any] = dict(resolve(JobFlags(), os.environ, str(config) if config else None).values)
    given = dict(order.options)
    if isinstance(given.get("pace"), str):
        given["pace"] = parse_pace(given["pace"])
    unknown = [name for name in given if name not in {field.name for field in fields(Job)}]
    if unknown:
        raise UsageError(f"paceline.init got {unknown[0]!r}, which is no option of a run")
    values |= given
    workers = order.workers - (order.beside if values.get("servers_apart") else 0)
    if not workers:
        raise UsageError(
            f"servers-apart is set, and all {order.workers} processes are on the servers' host, where none is to train",
            fix="start torchrun on other hosts too: --nnodes N; or PACELINE_SERVERS_APART=0",
        )
    values |= {"workers": workers, "max_workers": workers, "engine": "torchrun"}
    if not order.restarts:
        values["restarts"] = 0  # nobody will come in a lost one's place
    return Job(name=Path(order.script).stem, **values)
