"""The life of a forked process, from its fork to its exit: the outermost lines of workers and servers."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing.process
import multiprocessing.spawn
import multiprocessing.util
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from paceline.data.seeds import seed_all
from paceline.engine import context as contexts
from paceline.engine.context import Context
from paceline.engine.elsewhere.deputizing import deputize
from paceline.engine.name import name_process
from paceline.engine.setup import Setup, decode_job
from paceline.engine.worker.worker import Worker
from paceline.errors import PacelineError
from paceline.protocol import messages
from paceline.protocol.ranges import is_elsewhere
from paceline.transport import segment
from paceline.transport.board import Aborted, Board
from paceline.transport.channel import Channel, Closed
from paceline.transport.keys import job_key
from paceline.transport.lock import Lock

_PR_SET_PDEATHSIG = 1


def main(role: str, rank: int, setup: bytes, descriptors: tuple[int, ...], parent: int) -> NoReturn:
    """Be worker or server ``rank``. ``descriptors``: channel, board, log, and the payload of a call if any."""
    status = 1
    try:
        _die_with(parent)
        _own_streams(descriptors[2])
        known = msgspec.msgpack.decode(setup, type=Setup)
        letter = "s" if role == "server" else "w" if known.door is None else "d"  # a worker's deputy
        name_process(f"paceline:{letter}{rank}", [known.script, *known.args] if known.script else [])
        if role == "worker" and known.door is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a script, and what it starts, can be ended by it
        torch.set_num_threads(known.threads)
        board = Board(segment.attach(descriptors[1]))
        board.belongs_to(rank if role == "worker" else board.workers + rank)
        context = Context(
            job=decode_job(known.job),
            role=role,
            rank=rank,
            directory=Path(known.directory),
            channel=Channel(socket.socket(fileno=descriptors[0])),
            board=board,
            lock=Lock(descriptors[1], board.journal),
            resume=Path(known.resume) if known.resume else None,
            trained=known.trained,
        )
        contexts.current = context
        if role == "server":
            _import_as_workers(known)
            payload = descriptors[3] if len(descriptors) > 3 else None
            status = _guarded(context, lambda: _serve(context, known, payload))
        else:
            payload = descriptors[3] if len(descriptors) > 3 else None
            status = _guarded(context, lambda: _work(context, known, payload))
    except BaseException:  # noqa: BLE001  the outermost line
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):  # nobody is left to hear that its pipe is closed
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve(context: Context, known: Setup, payload: int | None) -> None:
    from paceline.engine.elsewhere import range_deputy
    from paceline.engine.exchange.server import serve

    door = known.door
    if door is None or not is_elsewhere(context.rank, context.job.server_hosts):
        serve(context)
        return
    assert payload is not None
    range_deputy.deputize(context, door, payload, None if door.insecure else job_key(os.environ))


def _work(context: Context, known: Setup, payload: int | None) -> None:
    seed_all(context.job.seed)  # a script that seeds nothing still starts alike on all workers
    try:
        if known.door is not None:
            assert payload is not None
            _import_as_workers(known)
            deputize(context, known.door, payload, None if known.door.insecure else job_key(os.environ), _note_worker)
            return
        if known.call is not None:
            assert payload is not None
            _call(context.rank, known.call, payload)
        else:
            script = Path(known.script)
            sys.argv = [known.script, *known.args]
            sys.path.insert(0, str(script.resolve().parent))
            runpy.run_path(known.script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            if isinstance(end.code, str):
                sys.stderr.write(end.code + "\n")
            failure = messages.Failed("ScriptError", f"worker {context.rank}: the script exited with {end.code!r}")
            context.channel.send(failure)
            raise
    _end_of_program()
    _finish(context)


def _note_worker(worker: Worker) -> None:
    contexts.worker = worker


def _import_as_workers(known: Setup) -> None:
    """A server finds an optimizer's class where the workers found it: beside the script, or on the program's path."""
    if known.call is not None:
        sys.path[:] = known.call["sys_path"]
    else:
        sys.path.insert(0, str(Path(known.script).resolve().parent))


def _finish(context: Context) -> None:
    """Tell everybody that the script is over, also where it never called init."""
    (contexts.worker or Worker(context)).finish()


def _call(rank: int, main: dict[str, Any], payload: int) -> None:
    """Import the launching program's main module as multiprocessing's spawn does, then call its function."""
    from multiprocessing.reduction import ForkingPickler

    contexts.importing_main = True
    multiprocessing.spawn.prepare(main)
    contexts.importing_main = False
    # Written by the launching program itself, into memory only its descendants have (docs/decisions/0003). All
    # workers share the descriptor's position, hence pread.
    function, args = ForkingPickler.loads(os.pread(payload, os.fstat(payload).st_size, 0))
    function(rank, *args)


def _end_of_program() -> None:
    """What the interpreter does after a script, without leaving: threads, exit functions, child processes."""
    threading._shutdown()  # type: ignore[attr-defined]
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _guarded(context: Context, body: Any) -> int:
    """Run ``body``; whatever ends it, tell the launcher what was done and why it ended. The exit status."""
    try:
        body()
        return 0
    except (Aborted, Closed):
        _tell_rest()
        return 75
    except KeyboardInterrupt:
        with contextlib.suppress(Closed):
            _finish(context)
        return 0
    except SystemExit:
        return 1
    except PacelineError as error:
        failure = messages.Failed(type(error).__name__, str(error.what), error.why, error.fix)
    except BaseException as error:  # noqa: BLE001  the outermost line of the user's script
        text = _user_traceback(error)
        last = traceback.format_exception_only(error)[-1].strip()
        failure = messages.Failed("ScriptError", f"{context.role} {context.rank} raised {last}", traceback=text)
    _tell_rest()
    with contextlib.suppress(Closed):
        context.channel.send(failure)
    return 1


def _tell_rest() -> None:
    """The rounds behind a worker count, also when it is stopped."""
    with contextlib.suppress(Aborted):
        if contexts.worker is not None:
            contexts.worker.close()


def _user_traceback(error: BaseException) -> str:
    """The traceback as plain ``python script.py`` would print it: from the script's first line on."""
    frames = error.__traceback__
    ours = (str(Path(__file__)), runpy.__file__, "<frozen runpy>")
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    if frames is None and isinstance(error, SyntaxError):
        return "".join(traceback.format_exception_only(error))  # of the script's own file: nothing of it has run
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


def _die_with(parent: int) -> None:
    """Be killed when the zygote ends, however it ends: nobody is left behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(75)


def _own_streams(log: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
