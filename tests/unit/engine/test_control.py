"""The socket of a run: who asks is answered, who talks nonsense is not, and nobody is there when it is over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paceline.engine.launcher.control import NAME, Control, ask
from paceline.errors import UsageError
from paceline.protocol import messages


@contextmanager
def answering(directory: Path) -> Iterator[None]:
    """A run that says what it was asked for."""
    control = Control(directory)
    over = threading.Event()

    def live() -> None:
        while not over.is_set():
            control.turn(lambda question: messages.Scaled((f"{question.workers} workers",)))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        control.close()


def test_who_asks_is_answered_each_time(tmp_path: Path) -> None:
    with answering(tmp_path):
        for workers in (3, 1):
            assert ask(tmp_path, messages.Scale(workers)) == messages.Scaled((f"{workers} workers",))


def test_a_path_may_be_longer_than_that_of_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    with answering(deep):
        assert ask(deep, messages.Scale(2)) == messages.Scaled(("2 workers",))


def test_nonsense_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    with answering(tmp_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(str(tmp_path / NAME))
            stranger.sendall(b"GET / HTTP/1.1")
            assert stranger.recv(100) == b""
        assert ask(tmp_path, messages.Scale(2)) == messages.Scaled(("2 workers",))


@pytest.mark.parametrize("was_there", [True, False])
def test_nobody_answers_for_a_run_that_is_over(was_there: bool, tmp_path: Path) -> None:
    if was_there:
        with answering(tmp_path):
            pass
    with pytest.raises(UsageError, match="is not going on"):
        ask(tmp_path, messages.Scale(2))


def test_the_socket_of_a_run_that_was_killed_is_replaced(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / NAME))
    left.close()
    with pytest.raises(UsageError):
        ask(tmp_path, messages.Scale(2))
    with answering(tmp_path):
        assert ask(tmp_path, messages.Scale(2)) == messages.Scaled(("2 workers",))
