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
from paceline.config import MAX_SERVERS, Job, parse_pace
from paceline.engine.launcher.front import run_local
from paceline.engine.program import STARTED, Doors, Elsewhere, Order, Script
from paceline.errors import PacelineError, UsageError
from paceline.events import Record, Started, Summary
from paceline.run.doors import hold_ports, own_address, ports_of, told, warn_insecure

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
        held = hold_ports(host, job)
    except PacelineError as error:
        report(error, sys.stderr)
        return error.exit_code
    ports, server_ports = ports_of(job, held)
    doors = Doors(host, ports, server_ports, _without_workers(job.servers_apart, job.server_hosts))
    os.write(order.report, msgspec.json.encode(doors) + b"\n")
    if job.insecure:
        warn_insecure()

    def engine(job: Job, program: Script, *, watch: Callable[[Record], None], argv: Sequence[str]) -> Summary:
        elsewhere = Elsewhere(
            program.path, program.args, host, ports, order.job, order.starter, order.report, job.insecure, server_ports
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
    apart = _without_workers(values.get("servers_apart", False), values.get("server_hosts", 1))
    workers = sum(order.hosts[apart:])
    if not workers:
        raise _nobody_trains(order.hosts, apart)
    values |= {"workers": workers, "max_workers": workers, "engine": "torchrun"}
    if not order.restarts:
        values["restarts"] = 0  # nobody will come in a lost one's place
    job = Job(name=Path(order.script).stem, **values)
    _check_server_hosts(job, order.hosts)
    return job


def _without_workers(servers_apart: bool, server_hosts: object) -> int:
    """On how many hosts, the first ones, nobody trains. Of anything that a Job would refuse: one."""
    if not servers_apart:
        return 0
    return server_hosts if isinstance(server_hosts, int) and 1 <= server_hosts <= MAX_SERVERS else 1


def _nobody_trains(hosts: Sequence[int], apart: int) -> UsageError:
    """``hosts``: how many processes each has; on the first ``apart`` none is to train, and there are no others."""
    if apart == 1:
        return UsageError(
            f"servers-apart is set, and all {sum(hosts)} processes are on the servers' host, where none is to train",
            fix="start torchrun on other hosts too: --nnodes N; or PACELINE_SERVERS_APART=0",
        )
    there = "one host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    return UsageError(
        f"server-hosts is {apart}, and all {sum(hosts)} processes are on {there}: none is left to train on",
        fix=f"start torchrun on {apart + 1} hosts at least: --nnodes N; or a smaller PACELINE_SERVER_HOSTS",
    )


def _check_server_hosts(job: Job, hosts: Sequence[int]) -> None:
    """Each of home's is a process that home forks; of another host each is one that was started there. Raises
    UsageError."""
    for host in range(1, job.server_hosts):
        needed = len(job.servers_on(host))
        if hosts[host] < needed:
            has = "1 process" if hosts[host] == 1 else f"{hosts[host]} processes"
            raise UsageError(
                f"of {job.servers} servers on {job.server_hosts} hosts, {needed} are to be on host {host}",
                why=f"each is a process that was started there, and it has {has}",
                fix=f"--nproc-per-node {needed} there; or PACELINE_SERVERS={job.server_hosts}",
            )
