"""The options of a run: where each value came from, and the ``Job`` they make.

A value is looked for in a flag, then in the environment (``PACELINE_WORKERS``), then in the --config file,
and is else the default. Flags and environment are text and are converted here alike.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from paceline import config_file
from paceline.config import ASSIGNMENTS, PACES, Job, parse_pace
from paceline.errors import UsageError

_USUAL_ASSIGNMENT = "lease at bounded and async, else round_robin"
JOB = Group("The job", sort_key=1)
HOSTS = Group("Several hosts", sort_key=2)
SHOWN = Group("What is shown", sort_key=3)


def _option(metavar: str, text: str, group: Group = JOB) -> Parameter:
    return Parameter(help=text, metavar=metavar, group=group)


def _switch(text: str) -> Parameter:
    return Parameter(help=text, negative="", show_default=False, group=SHOWN)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """What was written on the command line; None is what was not."""

    workers: Annotated[str | None, _option("N", "processes that train [default: 2]")] = None
    servers: Annotated[
        str | None, _option("K", "processes that hold the parameters; 0: the workers do [default: 0]")
    ] = None
    max_workers: Annotated[
        str | None, _option("N", "room for so many, see paceline scale [default: twice as many, at least 8]")
    ] = None
    max_servers: Annotated[
        str | None, _option("K", "room for so many, see paceline scale [default: twice as many]")
    ] = None
    pace: Annotated[str | None, _option("PACE", f"{', '.join(PACES)} [default: sync]")] = None
    assign: Annotated[
        str | None,
        _option(
            "HOW",
            f"how samples are dealt out: {', '.join(ASSIGNMENTS)} [default: lease at bounded, async; else round_robin]",
        ),
    ] = None
    data: Annotated[
        str | None,
        _option("WHERE", "shared: every worker can read all; own: each has its part; served: worker 0 sends batches"),
    ] = None
    staleness_damping: Annotated[
        bool, Parameter(help="bounded, async: lr / max(1, staleness)", negative="", show_default=False, group=JOB)
    ] = False
    compensate: Annotated[
        str | None, _option("LAMBDA", "bounded, async: make up for stale gradients; 0.04 is the paper's [default: off]")
    ] = None
    clip: Annotated[str | None, _option("X", "scale gradients down to a norm of X over all parameters")] = None
    restarts: Annotated[
        str | None, _option("N", "replace a worker that dies, up to N times without its getting on [default: 3]")
    ] = None
    min_workers: Annotated[
        str | None, _option("N", "with so many left go on without one that cannot be replaced [default: all]")
    ] = None
    hang_timeout: Annotated[
        str | None, _option("S", "replace a worker that others wait for and that does nothing so long [default: 30]")
    ] = None
    checkpoint_every: Annotated[
        str | None, _option("N", "save a checkpoint every N steps [default: only at Ctrl-C]")
    ] = None
    keep: Annotated[str | None, _option("N", "how many checkpoints stay [default: 2]")] = None
    threads: Annotated[str | None, _option("N", "threads of each process [default: cores / workers]")] = None
    seed: Annotated[str | None, _option("N", "of everything random [default: 0]")] = None
    steps: Annotated[str | None, _option("N", "stop after so many rounds, or as many samples at any pace")] = None
    epochs: Annotated[str | None, _option("N", "stop after so many passes over the data")] = None
    until_loss: Annotated[str | None, _option("X", "stop when the loss is down to this")] = None
    patience: Annotated[
        str | None, _option("N", "stop after so many looks (100 rounds or a pass) without a better loss")
    ] = None
    run_dir: Annotated[str | None, _option("DIR", "folder of the run directories [default: runs]")] = None
    engine: Annotated[
        str | None, _option("WHO", "who starts workers: local, on this machine, or ray, on its cluster", HOSTS)
    ] = None
    ray_address: Annotated[
        str | None, _option("ADDRESS", "the cluster [default: where Ray finds one, else one on this machine]", HOSTS)
    ] = None
    interface: Annotated[
        str | None, _option("WHICH", "ray: name, address or network that workers come to [default: Ray's own]", HOSTS)
    ] = None
    port: Annotated[
        str | None, _option("N", "ray: the first of the ports for workers, one each [default: any free]", HOSTS)
    ] = None
    insecure: Annotated[
        bool, Parameter(help="ray: links in plain text, nobody checked", negative="", show_default=False, group=HOSTS)
    ] = False
    servers_apart: Annotated[
        bool,
        Parameter(help="ray: no worker on this machine, servers only", negative="", show_default=False, group=HOSTS),
    ] = False
    server_hosts: Annotated[
        str | None, _option("S", "ray: servers-apart on so many hosts, in turn [default: 1, this one]", HOSTS)
    ] = None
    return_timeout: Annotated[
        str | None, _option("S", "ray: wait so long for a lost worker to come again [default: 60]", HOSTS)
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ShowFlags:
    """What is shown, and whether anything is started."""

    json: Annotated[bool, _switch("one JSON object as the last line of stdout; other text to stderr")] = False
    quiet: Annotated[bool, _switch("nothing but the script's own output and errors")] = False
    dry_run: Annotated[bool, _switch("show what would run, and where each value came from; start nothing")] = False


CONFIG = Parameter(name="--config", help="a config.toml to take values from", metavar="FILE", group=JOB)

OPTIONS = tuple(field.name for field in dataclasses.fields(JobFlags))
# Scripts of many people have these; that they follow the script is no sign of a mistake.
_COMMON = ("port", "interface", "threads", "data", "seed", "steps", "epochs", "patience")
OPTIONS_OF_OURS_ALONE = tuple(option for option in OPTIONS if option not in _COMMON)
FOR_ELSEWHERE = ("ray_address", "interface", "port", "insecure", "return_timeout")
_OTHER_VARIABLES = ("resume", "job_key", "job_key_file")  # that are not options
SWITCHES = tuple(field.name for field in dataclasses.fields(ShowFlags))


@dataclass(frozen=True)
class Settings:
    """The values of a job that someone set, by the Job's field, and the source of every field's value."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    script: str | None = None  # of the --config file
    args: tuple[str, ...] = ()

    def job(self, name: str) -> Job:
        return Job(name=name, **self.values)


def flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def variable(option: str) -> str:
    return "PACELINE_" + option.upper()


def resolve(
    flags: JobFlags,
    environment: Mapping[str, str],
    config: str | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """Flag before environment before ``config`` (a file's path) before ``defaults`` before the Job's own."""
    config = config or environment.get(variable("config")) or None
    file = config_file.load(Path(config)) if config else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for option in OPTIONS:
        key = job_field(option)
        if option in TRUTHS:
            if getattr(flags, option):
                values[key], sources[key] = True, flag(option)
            elif environment.get(variable(option)):
                values[key], sources[key] = _truth(option, environment), variable(option)
            elif key in file:
                values[key], sources[key] = file[key], str(config)
            else:
                sources[key] = "default"
        elif (text := getattr(flags, option)) is not None:
            values[key], sources[key] = _converted(option, text, flag(option)), flag(option)
        elif text := environment.get(variable(option)):
            values[key], sources[key] = _converted(option, text, variable(option)), variable(option)
        elif key in file:
            values[key], sources[key] = file[key], str(config)
        elif defaults and key in defaults:
            values[key], sources[key] = defaults[key], "default"
        else:
            sources[key] = "default"
    script, args = file.get("script"), file.get("args", ())
    assert script is None or isinstance(script, str)
    assert isinstance(args, tuple)
    return Settings(values, sources, script, args)


def unknown_variables(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Those that begin as ours do and are none, each with that which it is like, or ""."""
    known = [variable(name) for name in (*OPTIONS, *SWITCHES, "config", *_OTHER_VARIABLES)]
    strange = sorted(name for name in environment if name.startswith(variable("")) and name not in known)
    return [(name, next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), "")) for name in strange]


def switched(flags: ShowFlags, environment: Mapping[str, str]) -> ShowFlags:
    """The switches, each also on if its variable says so (``PACELINE_JSON=1``)."""
    return ShowFlags(**{name: getattr(flags, name) or _truth(name, environment) for name in SWITCHES})


def job_field(option: str) -> str:
    return "runs" if option == "run_dir" else option


def _truth(name: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(variable(name), "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise UsageError(f"{variable(name)} is {text!r}; it must be 1 or 0")


def _converted(option: str, text: str, source: str) -> object:
    convert, wanted = _KINDS.get(option, _WHOLE)
    try:
        return convert(text)
    except ValueError:
        raise UsageError(f"{source} is {text!r}; it must be {wanted}") from None


_WHOLE: tuple[Callable[[str], object], str] = (int, "a whole number")
TRUTHS = ("staleness_damping", "insecure", "servers_apart")
_KINDS: dict[str, tuple[Callable[[str], object], str]] = {
    "data": (str, "a word"),
    "engine": (str, "a word"),
    "ray_address": (str, "an address"),
    "interface": (str, "a name"),
    "return_timeout": (float, "a number"),
    "compensate": (float, "a number"),
    "clip": (float, "a number"),
    "hang_timeout": (float, "a number"),
    "pace": (parse_pace, "a pace"),
    "assign": (str, "a word"),
    "until_loss": (float, "a number"),
    "run_dir": (Path, "a folder"),
}
