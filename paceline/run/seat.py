"""A process that an actor of Ray has started, on any node: a worker's, which runs the script once its way home is made,
or a server's.

What it prints travels home along its link, in order with all else, so that nothing is shown twice or after the end.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from paceline.data.seeds import seed_all
from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.engine.program import Errand
from paceline.errors import ConfigError, PacelineError, ScriptError
from paceline.run import session
from paceline.run.elsewhere import Life, be_server, meet
from paceline.transport.keys import JobKey, job_key

_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 15
_LAST_S = 2.0  # for what was printed to be on its way


def main(parent: int) -> NoReturn:
    """Be the worker, or the server, that the errand on standard input asks for."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    errand = msgspec.json.decode(sys.stdin.buffer.read(), type=Errand)
    try:
        key = _key(errand)
        if errand.server >= 0:
            torch.set_num_threads(errand.threads)
            _import_beside(errand.script)  # the optimizer's class may be there
            be_server(errand.server, errand.job, (errand.host, errand.port), key)
        worker = meet(errand.rank, 0, errand.job, (errand.host, errand.port), key)
    except PacelineError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    life = Life(worker, None)
    life.begin()
    prints = _Prints(worker)
    prints.begin()  # ends before that life does
    session.take_place(worker)
    torch.set_num_threads(errand.threads)
    seed_all(worker.job.seed)  # a script that seeds nothing still starts alike on all workers
    sys.argv = [errand.script, *errand.args]
    _import_beside(errand.script)
    try:
        runpy.run_path(errand.script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0) and not worker.is_over:
            prints.end()  # before home hears of it, and ends the run
            life.tell(ScriptError(f"worker {errand.rank}: the script exited with {end.code!r}"))
        raise
    except BaseException:
        prints.end()
        raise
    sys.exit(0)


def _import_beside(script: str) -> None:
    sys.path.insert(0, str(Path(script).resolve().parent))


def _key(errand: Errand) -> JobKey | None:
    """Raises ConfigError if there is none, and there should be."""
    if errand.insecure:
        return None
    key = JobKey(bytes.fromhex(errand.key)) if errand.key else job_key(os.environ)
    if key is None:
        raise ConfigError(
            "the run has a job key of yours, and this node has none",
            fix="set PACELINE_JOB_KEY or PACELINE_JOB_KEY_FILE on every node; or nowhere: then the run makes one",
        )
    return key


class _Prints:
    """What this process prints, on its way home."""

    def __init__(self, worker: RemoteWorker) -> None:
        self._worker = worker
        self._own = (os.dup(1), os.dup(2))
        self._readable, writable = os.pipe()
        for number in (1, 2):
            os.dup2(writable, number)
        os.close(writable)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self._thread = threading.Thread(target=self._carry, name="paceline-prints", daemon=True)

    def begin(self) -> None:
        self._thread.start()
        atexit.register(self.end)

    def _carry(self) -> None:
        while data := os.read(self._readable, _CHUNK):
            os.write(self._own[0], data)  # for the actor, where home cannot be told any more
            self._worker.printed(data)

    def end(self) -> None:
        """All that was printed is on its way; what is printed from here on is the actor's."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in zip((1, 2), self._own, strict=True):
            os.dup2(own, number)
        self._thread.join(_LAST_S)  # longer only if a child of the script's has them too
