"""The lock: one holder at a time, among threads and among processes, and none once the holder is dead."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.transport import segment
from paceline.transport.journal import WORDS, Journal
from paceline.transport.lock import Lock

TIMES = 2000
ROOT = Path(__file__).resolve().parents[3]
_COUNT = struct.Struct("q")


@pytest.fixture
def fd() -> Iterator[int]:
    made = segment.create("test", 8 * (WORDS + 64))
    yield made
    os.close(made)


def count_up(memory: mmap.mmap, lock: Lock) -> None:
    """Read, and write one more: updates are lost where two do it at once."""
    for _ in range(TIMES):
        with lock:
            (value,) = _COUNT.unpack_from(memory, 0)
            os.sched_yield()
            _COUNT.pack_into(memory, 0, value + 1)


def test_threads_with_a_lock_each_exclude_one_another(fd: int) -> None:
    memory = segment.attach(fd)
    threads = [threading.Thread(target=count_up, args=(memory, Lock(fd))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _COUNT.unpack_from(memory, 0) == (3 * TIMES,)


CHILD = """
import os, signal, sys
from paceline.transport import segment
from paceline.transport.lock import Lock
from tests.unit.transport.test_lock import count_up

fd, answers, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lock = Lock(fd)
if what == "counts":
    count_up(segment.attach(fd), lock)
else:
    lock.__enter__()
    os.write(answers, b"held")
    if what == "holds":
        signal.pause()
    os._exit(0)
"""


def in_a_child(fd: int, answers: int, what: str) -> subprocess.Popen[bytes]:
    """A process that makes a lock of its own over the same file."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(fd), str(answers), what],
        pass_fds=(fd, answers),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_processes_exclude_one_another(fd: int, pipe: tuple[int, int]) -> None:
    children = [in_a_child(fd, pipe[1], "counts") for _ in range(2)]
    memory = segment.attach(fd)
    count_up(memory, Lock(fd))
    assert [child.wait(30) for child in children] == [0, 0]
    assert _COUNT.unpack_from(memory, 0) == (3 * TIMES,)


def is_free(fd: int) -> bool:
    """Whether a lock could be taken now; asked of the kernel, without waiting."""
    import fcntl

    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        answer = fcntl.fcntl(own, fcntl.F_OFD_GETLK, asked)
        return bool(struct.unpack("hhqqi4x", answer)[0] == fcntl.F_UNLCK)
    finally:
        os.close(own)


def test_a_killed_holder_holds_it_no_more(fd: int, pipe: tuple[int, int]) -> None:
    child = in_a_child(fd, pipe[1], "holds")
    assert os.read(pipe[0], 4) == b"held"
    assert not is_free(fd)
    taken = threading.Event()

    def take() -> None:
        with Lock(fd):
            taken.set()

    waiting = threading.Thread(target=take, daemon=True)
    waiting.start()
    child.kill()
    assert child.wait(30) == -signal.SIGKILL
    assert taken.wait(30)
    waiting.join()
    assert is_free(fd)


def test_a_process_that_ends_while_it_holds_it_gives_it_back(fd: int, pipe: tuple[int, int]) -> None:
    child = in_a_child(fd, pipe[1], "ends")
    assert os.read(pipe[0], 4) == b"held"
    assert child.wait(30) == 0
    with Lock(fd):
        assert not is_free(fd)
    assert is_free(fd)


def test_an_error_inside_gives_it_back(fd: int) -> None:
    lock = Lock(fd)
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    assert is_free(fd)


def test_it_does_not_go_with_the_descriptor_it_was_made_from(fd: int) -> None:
    copy = os.dup(fd)
    lock = Lock(copy)
    with lock:
        os.close(copy)
        assert not is_free(fd)


def test_locks_over_other_files_are_others(fd: int) -> None:
    other = segment.create("test", 4096)
    with Lock(fd), Lock(other):
        assert not is_free(fd)
        assert not is_free(other)
    os.close(other)


def test_what_a_killed_holder_left_half_done_is_undone_by_the_next(fd: int) -> None:
    memory = memoryview(segment.attach(fd)).cast("Q")

    def lock() -> tuple[Lock, Journal]:
        journal = Journal(memory[64:])
        journal.map(0, memory[:64])
        return Lock(fd, journal), journal

    holder, journal = lock()
    cells = journal.watch(0, 0, 64)
    with holder:
        cells[5] = 1
    holder.__enter__()
    cells[5], cells[6] = 2, 3
    other, _ = lock()
    other.try_to_mend()  # the holder is alive
    assert (memory[5], memory[6]) == (2, 3)
    holder.forget()  # the kernel does so when it dies
    other.try_to_mend()
    assert (memory[5], memory[6]) == (1, 0)
    assert is_free(fd)


def test_an_error_inside_undoes_what_was_done(fd: int) -> None:
    memory = memoryview(segment.attach(fd)).cast("Q")
    journal = Journal(memory[64:])
    journal.map(0, memory[:64])
    cells, lock = journal.watch(0, 0, 64), Lock(fd, journal)

    def fail() -> None:
        with lock:
            cells[5] = 1
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert memory[5] == 0
