"""A worker in a process that home has not forked: the way to its deputy, and its life until the process ends. And the
life of one that is no worker, as the host is home's and the servers' alone."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import NoReturn, Protocol

from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.line import STOPPED, Line, NotLetIn
from paceline.engine.elsewhere.mail import PATIENCE
from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.engine.elsewhere.stillness import tell_of_stillness
from paceline.errors import HostError, PacelineError
from paceline.protocol import messages, remote
from paceline.protocol.link import Peer
from paceline.transport.connect import connect
from paceline.transport.ends import End
from paceline.transport.keys import JobKey
from paceline.transport.tls import Credentials

_CONNECT_S = 30.0
_AGAIN_S = 0.1
_SEEN_S = 1.0  # until home has seen that a process has died


def meet(
    rank: int,
    incarnation: int,
    job: str,
    address: tuple[str, int],
    key: JobKey | None,
    around: Around | None = None,
) -> RemoteWorker:
    """Become worker ``rank`` of ``job``, whose deputy listens at ``address``. ``key``: None for plain text.
    ``around``: what is known of the others, if anything.

    If its place had another before, home may have to see first that that one is gone. Raises HostError.
    """
    deadline_s = time.monotonic() + _CONNECT_S
    while True:
        line = Line(rank)
        end = End(
            me=Peer(rank, "worker", incarnation),
            job=job,
            messages=remote.Any_,
            sink=line.sink,
            place=line.mail.place,
            credentials=None if key is None else Credentials.issue(key),
            insecure=key is None,
            patience=PATIENCE,
        )
        link = connect(end, address, _CONNECT_S)
        try:
            worker = RemoteWorker(link, line, rank, around or Around())
        except NotLetIn as reason:
            if time.monotonic() > deadline_s:
                raise HostError(f"worker {rank} is not let in: {reason}") from None
            time.sleep(_AGAIN_S)
        else:
            tell_of_stillness(link, line)
            return worker


class Home(Protocol):
    """The run's home, for the worker whose process has started it or stands for that one."""

    def interrupt(self) -> None: ...

    def wait(self) -> int:
        """Its exit code, when the run has ended."""


def attend(home: Home, *, may_come_again: bool) -> NoReturn:
    """Wait for the end of a run in which this process is no worker, and exit as the run does."""
    Life(_Bystander(home), home, may_come_again=may_come_again).begin()
    sys.exit(home.wait())


def be_server(server: int, job: str, address: tuple[str, int], key: JobKey | None) -> NoReturn:
    """Be server ``server`` of ``job``, whose deputy listens at ``address``, until the run is over, and exit."""
    from paceline.run.serving import serve

    try:
        code = serve(server, job, address, key, None)
    except PacelineError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    sys.exit(code)


class _Bystander:
    """In a worker's stead: a process that has home and has nothing else to say of itself."""

    rank = -1

    def __init__(self, home: Home) -> None:
        self._home = home

    def terminated(self) -> None:
        self._home.interrupt()

    def abandon(self) -> None:
        pass

    def broke(self, failure: messages.Failed) -> None:
        pass

    def finish(self) -> None:
        pass


class Life:
    """From init to the process's end: its signals, its last words, its exit code."""

    def __init__(self, worker: RemoteWorker | _Bystander, home: Home | None, *, may_come_again: bool = True) -> None:
        """``may_come_again``: its process may be ended to be started once more."""
        self._worker, self._home, self._may_come_again = worker, home, may_come_again
        self._interrupts, self._is_terminated, self._pid = 0, False, os.getpid()

    def begin(self) -> None:
        self._hook, sys.excepthook = sys.excepthook, self._raised
        atexit.register(self._end)
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupted)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not self._may_come_again:
            signal.signal(signal.SIGTERM, self._terminate)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: home has all end in the same step; the second time this process ends now."""
        self._interrupts += 1
        if self._home is not None:
            self._home.interrupt()
        if self._interrupts > 1:
            self._worker.abandon()  # it may wait for an answer, which nobody will take now
            raise KeyboardInterrupt

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """As Ctrl-C, once: SLURM and Kubernetes take the host away, in half a minute or so. But who starts processes
        also ends those that are left when one has died: home has seen that by then, and ends the run because of it."""
        if not self._is_terminated:
            self._is_terminated = True
            told = threading.Timer(_SEEN_S, self._worker.terminated)
            told.daemon = True
            told.start()

    def _raised(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self._hook(kind, error, trace)
            self.tell(error)

    def tell(self, error: BaseException) -> None:
        """Home is to know what the script has raised."""
        if isinstance(error, PacelineError):
            failure = messages.Failed(type(error).__name__, error.what, error.why, error.fix)
        else:
            last = traceback.format_exception_only(error)[-1].strip()
            text = "".join(traceback.format_exception(error))
            failure = messages.Failed("ScriptError", f"worker {self._worker.rank} raised {last}", traceback=text)
        with contextlib.suppress(SystemExit, PacelineError, KeyboardInterrupt):
            self._worker.broke(failure)

    def _end(self) -> None:
        if os.getpid() != self._pid:
            return  # a child that the script has forked
        code = self.finish()
        if self._home is not None:
            code = self._home.wait() or code
        if code:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def finish(self) -> int:
        """The script is over; the exit code of this process."""
        try:
            self._worker.finish()
        except SystemExit:
            return STOPPED
        except (PacelineError, KeyboardInterrupt):
            return 1
        return 0
