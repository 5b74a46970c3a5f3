"""The command ``paceline``: what can be typed, and the way from a mistake to its exit code.

Everything heavy is imported by the command that needs it: ``paceline --help`` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

import paceline
from paceline.cli.failure import misuse, report
from paceline.cli.fence import TRAINING, brought_forward, fenced, ours, text_of
from paceline.cli.options import CONFIG, SHOWN, JobFlags, ShowFlags, switched
from paceline.errors import Interrupted, PacelineError, UsageError

SCRIPT_ARGS = Parameter(
    help="the script's own arguments, given to it untouched", metavar="ARGS", allow_leading_hyphen=True
)
FOLDER = Parameter(name="--run-dir", metavar="DIR", help="folder of the run directories [default: runs]")
JSON = Parameter(name="--json", help="JSON instead of a table", negative="", show_default=False)

app = App(
    name="paceline",
    help="Train one PyTorch model on many processes, at the pace they can keep.",
    version=f"paceline {paceline.__version__}",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  paceline demo                          see it work
  paceline run --workers 4 train.py      train your script on 4 processes
  paceline runs list                     what has been trained

`paceline COMMAND --help` tells more.""",
)
runs = App(name="runs", help="List runs, and show what one of them did.", help_epilogue="")
config = App(name="config", help="Show the options and where their values come from.", help_epilogue="")
export = App(name="export", help="Write SCRIPT as a job of a cluster: for SLURM, or for Kubernetes.", help_epilogue="")
app.command(runs)
app.command(export)
app.command(config)


@app.command(
    usage="Usage: paceline run [OPTIONS] SCRIPT [ARGS]",
    help_epilogue="""\
Options of paceline stand before SCRIPT. They may follow it where nothing else
does: what is the script's own then comes after a --. Options that the script's
text names are the script's.
Each can also be set in the environment, as PACELINE_WORKERS=4, or in a
--config file. A flag wins over the environment, and that over the file.

Examples:
  paceline run train.py
  paceline run --workers 4 --until-loss 0.1 train.py --lr 0.05
  paceline run --workers 4 --servers 2 --dry-run train.py
  paceline run train.py --workers 4 -- --lr 0.05
  paceline run --config runs/20260131-0900-train-sync/config.toml""",
)
def run(
    script: Annotated[str | None, Parameter(help="a Python script that calls paceline.init()")] = None,
    /,
    *args: Annotated[str, SCRIPT_ARGS],
    flags: JobFlags = JobFlags(),  # noqa: B008
    show: ShowFlags = ShowFlags(),  # noqa: B008
    config: Annotated[str | None, CONFIG] = None,
) -> int:
    """Train SCRIPT on many processes."""
    from paceline.cli.run import run_script
    from paceline.engine.launcher.front import run_local

    return _refusable(show, lambda show: run_script(script, args, flags, show, config, run_local))


@app.command(
    usage="Usage: paceline resume [OPTIONS] [RUN]",
    help_epilogue="""\
RUN is a run directory or a part of its name; the newest without. The script
runs again from its top with what it was given then; passes that were trained
on have one batch each, then training goes on where the checkpoint was made.
An option given here wins over that of the run: more workers, another pace.

Examples:
  paceline resume
  paceline resume 20260131-0900-train-sync --workers 4""",
)
def resume(
    run: Annotated[str | None, Parameter(help="a run directory, or part of its name", show_default=False)] = None,
    /,
    *,
    flags: JobFlags = JobFlags(),  # noqa: B008
    show: ShowFlags = ShowFlags(),  # noqa: B008
) -> int:
    """Go on with a run from its newest good checkpoint."""
    from paceline.cli.resume import resume_run
    from paceline.engine.launcher.front import run_local

    return _refusable(show, lambda show: resume_run(run, flags, show, _folder(flags.run_dir), run_local))


@app.command(
    usage="Usage: paceline scale [OPTIONS] [RUN]",
    help_epilogue="""\
RUN is a run directory or a part of its name; the newest without. Workers that
are added run the script from its top, with one batch of each epoch that is
over, and then train with the others. Those with the highest numbers leave,
between two steps, or at the end of the epoch where their part of it is fixed
(--assign). Servers come and leave between two steps, where there are any.
Without options it says how many there are.

Examples:
  paceline scale --workers 4
  paceline scale 20260131-0900-train-sync --workers 1 --servers 2""",
)
def scale(
    run: Annotated[str | None, Parameter(help="a run directory, or part of its name", show_default=False)] = None,
    /,
    *,
    workers: Annotated[int | None, Parameter(help="how many there shall be", show_default=False)] = None,
    servers: Annotated[int | None, Parameter(help="how many there shall be", show_default=False)] = None,
    run_dir: Annotated[str | None, FOLDER] = None,
) -> int:
    """Add workers or servers to a run that is going on, or let some leave."""
    from paceline.cli.scale import scale_run

    return scale_run(run, workers, servers, _folder(run_dir))


@app.command(
    usage="Usage: paceline demo [OPTIONS] [NAME] [ARGS]",
    help_epilogue="""\
NAME is text (a transformer learns to write Python; the default), linear
(a line through points) or digits (handwritten ones, with scikit-learn).
What follows NAME goes to the example's script.

Examples:
  paceline demo
  paceline demo linear --method sgd
  paceline demo --workers 3 --compare digits""",
)
def demo(
    name: Annotated[str | None, Parameter(help="text, linear or digits", show_default=False)] = None,
    /,
    *args: Annotated[str, SCRIPT_ARGS],
    flags: JobFlags = JobFlags(),  # noqa: B008
    show: ShowFlags = ShowFlags(),  # noqa: B008
    compare: Annotated[
        bool,
        Parameter(help="measure one process first (text always does)", negative="", show_default=False, group=SHOWN),
    ] = False,
) -> int:
    """Train an example that comes with paceline."""
    from paceline.cli.demo import run_demo
    from paceline.engine.launcher.front import run_local

    return _refusable(show, lambda show: run_demo(name, args, flags, show, compare, run_local))


@app.command(
    help_epilogue="""\
A measurement between two machines needs the job key on both, in
PACELINE_JOB_KEY_FILE (or --insecure on both).

Examples:
  paceline doctor
  paceline doctor --listen               on one machine
  paceline doctor --peer node7:29777     on another one""",
)
def doctor(
    *,
    listen: Annotated[
        bool, Parameter(help="answer --peer of another machine", negative="", show_default=False)
    ] = False,
    peer: Annotated[str | None, Parameter(help="measure the link to it", metavar="HOST:PORT")] = None,
    port: Annotated[int | None, Parameter(help="port to try, or to listen at [default: 29777 with --listen]")] = None,
    interface: Annotated[str | None, Parameter(help="name, address or network that others are to be told")] = None,
    insecure: Annotated[bool, Parameter(help="plain text, nobody checked", negative="", show_default=False)] = False,
    run_dir: Annotated[str | None, FOLDER] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """What this machine has for training, what is missing, and what to do about it."""
    from rich.console import Console as Screen

    from paceline.cli import doctor as checks

    if listen and peer is not None:
        raise UsageError("--listen and --peer are the two sides of one measurement", fix="one of them on each machine")
    screen = Screen(highlight=False, markup=False)
    if listen:
        return checks.listen(os.environ, checks.PORT if port is None else port, insecure, screen)
    if peer is not None:
        return checks.show_peer(os.environ, peer, insecure, json, screen)
    return checks.show_machine(os.environ, _folder(run_dir), port or 0, interface, json, screen)


@app.command(
    help_epilogue="""\
Every process of a job must have its key and nobody else may: copy the file to
each host as it is (mode 0600), and name it in PACELINE_JOB_KEY_FILE there.

Examples:
  paceline key
  paceline key ~/.config/paceline/night.key""",
)
def key(
    file: Annotated[str, Parameter(help="where it is written; it must not exist [default: job.key]")] = "job.key",
    /,
) -> int:
    """Make a job key, which lets the processes of a job on several hosts know each other."""
    from paceline.cli.key import make_key

    return make_key(Path(file))


NODES = Parameter(help="hosts, each with an equal number of workers [default: 1]", metavar="N", show_default=False)
OUTPUT = Parameter(help="where it is written [default: standard output]", metavar="FILE")


@export.command(
    name="slurm",
    usage="Usage: paceline export slurm [OPTIONS] SCRIPT [ARGS]",
    help_epilogue="""\
A batch script that starts torchrun on every node. The folder it is submitted
in must be shared by all; the job key is made there, if there is none yet.

Examples:
  paceline export slurm --nodes 2 --workers 8 train.py > train.sbatch
  paceline export slurm --nodes 4 --workers 4 --pace bounded:4 train.py --lr 0.1""",
)
def export_slurm(
    script: Annotated[str, Parameter(help="a Python script that calls paceline.init()")],
    /,
    *args: Annotated[str, SCRIPT_ARGS],
    flags: JobFlags = JobFlags(),  # noqa: B008
    nodes: Annotated[int, NODES] = 1,
    output: Annotated[str | None, OUTPUT] = None,
) -> int:
    """A batch script for sbatch."""
    from paceline.cli.export import export as write

    return write("slurm", script, args, flags, nodes=nodes, output=output)


@export.command(
    name="k8s",
    usage="Usage: paceline export k8s --image IMAGE [OPTIONS] SCRIPT [ARGS]",
    help_epilogue="""\
A TrainJob of Kubeflow's Trainer, or a RayJob of KubeRay. The image has
paceline, the script and its data. The job key comes from a Secret; what is
written says how that is made.

Examples:
  paceline export k8s --image me/train:1 --nodes 2 --workers 8 /app/train.py
  paceline export k8s --image me/train:1 --kind rayjob --workers 4 /app/train.py""",
)
def export_k8s(
    script: Annotated[str, Parameter(help="a Python script that calls paceline.init(), as the image has it")],
    /,
    *args: Annotated[str, SCRIPT_ARGS],
    flags: JobFlags = JobFlags(),  # noqa: B008
    image: Annotated[str | None, Parameter(help="the containers' image", metavar="IMAGE")] = None,
    kind: Annotated[str, Parameter(help="trainjob or rayjob [default: trainjob]", show_default=False)] = "trainjob",
    nodes: Annotated[int, NODES] = 1,
    output: Annotated[str | None, OUTPUT] = None,
) -> int:
    """A manifest for kubectl apply."""
    from paceline.cli.export import export as write

    return write("k8s", script, args, flags, nodes=nodes, image=image, kind=kind, output=output)


@runs.command(
    name="list",
    help_epilogue="""\
Examples:
  paceline runs list
  paceline runs list --run-dir /data/runs --json""",
)
def runs_list(*, run_dir: Annotated[str | None, FOLDER] = None, json: Annotated[bool, JSON] = False) -> int:
    """A line for every run: status, pace, workers, steps, loss, samples/s."""
    from rich.console import Console as Screen

    from paceline.cli.runs import show_list

    return show_list(_folder(run_dir), json, Screen(highlight=False, markup=False))


@runs.command(
    name="show",
    help_epilogue="""\
Examples:
  paceline runs show                     the newest
  paceline runs show text                the one run with "text" in its name
  paceline runs show runs/20260131-0900-train-sync --json""",
)
def runs_show(
    run: Annotated[str | None, Parameter(help="a run's name, a part of it, or its path", show_default=False)] = None,
    /,
    *,
    run_dir: Annotated[str | None, FOLDER] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """What one run was and did: command, speed, loss, events, files."""
    from rich.console import Console as Screen

    from paceline.cli.runs import show_run

    return show_run(_folder(run_dir), run, json, Screen(highlight=False, markup=False))


@config.command(
    name="show",
    help_epilogue="""\
Examples:
  paceline config show
  paceline config show --workers 4 --config my.toml
  PACELINE_WORKERS=4 paceline config show --json""",
)
def config_show(
    *,
    flags: JobFlags = JobFlags(),  # noqa: B008
    config: Annotated[str | None, CONFIG] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """Every option, its value, and whether a flag, the environment, a file or nobody set it."""
    from paceline.cli.answers import show_settings
    from paceline.cli.options import resolve

    return show_settings(resolve(flags, os.environ, config), ShowFlags(json=json))


def main(tokens: Sequence[str] | None = None) -> NoReturn:
    """The entry point: runs one command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our letters shows a ? and goes on
    try:
        code = answer(list(sys.argv[1:] if tokens is None else tokens))
        sys.stdout.flush()
    except BrokenPipeError:  # `paceline runs list | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; where Python ends, Ctrl-C is a traceback of its own
    sys.exit(code)


def answer(tokens: list[str]) -> int:
    """The exit code of one command line, everything said that there is to say."""
    try:
        tokens = brought_forward(tokens, text_of)
        result = app(fenced(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        failure: PacelineError = misuse(error)
        _refuse(failure, promised=tokens[:1] in TRAINING and "--json" in ours(tokens))
    except PacelineError as error:
        failure = error
    except KeyboardInterrupt:
        failure = Interrupted("interrupted")
    else:
        return result if isinstance(result, int) else 0
    report(failure, sys.stderr)
    return failure.exit_code


def _refusable(show: ShowFlags, command: Callable[[ShowFlags], int]) -> int:
    """Runs a command that promises an object to --json, also where it is refused before there is a run."""
    show = switched(show, os.environ)
    try:
        return command(show)
    except PacelineError as error:
        _refuse(error, promised=show.json)
        raise


def _refuse(error: PacelineError, *, promised: bool) -> None:
    from paceline.cli.answers import print_json, result

    if promised:
        print_json(result(None, None, error, {}))


def _folder(run_dir: str | None) -> Path:
    return Path(run_dir or os.environ.get("PACELINE_RUN_DIR") or "runs")
