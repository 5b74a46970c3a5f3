"""``paceline.launch``: start workers from a Python program, as ``torch.multiprocessing.spawn`` does."""

from __future__ import annotations

import copyreg
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from multiprocessing import spawn
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from paceline.config import Job, Pace, parse_pace
from paceline.engine import context as contexts
from paceline.engine.launcher.front import run_local
from paceline.engine.program import Call
from paceline.errors import ConfigError, ScriptError, UsageError
from paceline.events import Output, Record, Summary


def launch(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: int = 2,
    pace: str | Pace = "sync",
    watch: Callable[[Record], None] | None = None,
    **options: Any,
) -> Summary:
    """Run ``fn(rank, *args)`` in ``workers`` processes; blocks until all have ended. In it, ``init()`` is the run.

    ``fn`` must be importable (defined at the top of a module), ``args`` must be picklable: each worker imports the
    main module anew, which is why a program needs ``if __name__ == "__main__":``. ``options`` are the other fields of
    ``paceline.Job``. ``watch`` sees every record of the run; without it worker 0's output is printed. Raises a
    PacelineError when the run fails.
    """
    if contexts.importing_main or contexts.current is not None:
        raise UsageError(
            f"launch of {getattr(fn, '__name__', fn)!s} was reached inside a worker",
            why="each worker imports the main module, and this call is not under a guard",
            fix="put it under: if __name__ == '__main__':",
        )
    name = str(options.pop("name", getattr(fn, "__name__", "launch")).strip("_<>") or "launch")
    job = Job(name=name, workers=workers, pace=parse_pace(pace) if isinstance(pace, str) else pace, **options)
    if job.engine != "local":
        raise UsageError(
            f"engine is {job.engine!r}; launch starts workers on this machine", fix="paceline run --engine ray SCRIPT"
        )
    try:
        inspect.signature(fn).bind(0, *args)
    except TypeError as error:
        raise UsageError(
            f"{job.name} cannot be called as {job.name}(rank, *args) with {len(args)} args: {error}",
            fix=f"def {job.name}(rank, ...): the first parameter is the worker's number, as in mp.spawn",
        ) from None
    try:
        return run_local(job, encode(fn, tuple(args)), watch=watch or print_output, argv=sys.argv)
    except ScriptError as error:
        if error.traceback:
            error.add_note(f"in the worker:\n{error.traceback}")
        raise


def encode(fn: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    """The call as a program for workers. Raises ConfigError for what cannot be sent to them."""
    name = getattr(fn, "__qualname__", repr(fn))
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(fn, "__module__", "") == "__main__" and main_file is None:
        raise ConfigError(
            f"{name} is defined in an interactive session, where workers cannot import it",
            fix="put it in a file and import it from there",
        )
    try:
        buffer = io.BytesIO()
        pickler = ForkingPickler(buffer)
        # By value: torch's own reductions would leave tensors behind with a thread of this process.
        pickler.dispatch_table = copyreg.dispatch_table
        pickler.dump((fn, args))
    except Exception as error:  # noqa: BLE001  whatever an object's own reduction raises
        raise ConfigError(
            f"{name} and its arguments cannot be sent to workers: {error}",
            fix="define functions and classes at the top of a module, and pass plain data",
        ) from None
    return Call(_main_module(), buffer.getvalue(), name)


def print_output(record: Record) -> None:
    """Show worker 0's output as it comes."""
    if isinstance(record, Output):
        sys.stdout.write(record.text)
        sys.stdout.flush()


def _main_module() -> dict[str, object]:
    """How a worker imports this program's main module: multiprocessing's own preparation data, as plain values."""
    known = spawn.get_preparation_data("paceline-worker")
    keys = ("sys_path", "sys_argv", "orig_dir", "dir", "init_main_from_name", "init_main_from_path")
    plain = {key: known[key] for key in keys if key in known}
    plain["sys_path"] = [str(Path(entry)) if entry else "" for entry in known["sys_path"]]
    return plain
