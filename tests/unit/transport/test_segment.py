"""Shared memory: reserved when made, refused in words when there is not enough, gone with its last user."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from paceline.errors import HostError
from paceline.transport import segment
from paceline.transport.segment import HUGE_PAGE, PAGE


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3_000_000])
def test_a_segment_is_zeroed_and_reserved_in_whole_pages(size: int) -> None:
    fd = segment.create("test", size)
    expected = max(PAGE, -(-size // PAGE) * PAGE)
    status = os.fstat(fd)
    assert status.st_size == expected
    assert status.st_blocks * 512 >= expected  # not only promised: the pages are there
    with segment.attach(fd) as memory:
        assert len(memory) == expected
        assert memory[:] == bytes(expected)
    os.close(fd)


def _mappings() -> int:
    with open("/proc/self/maps") as lines:
        return sum("memfd:paceline-large" in line for line in lines)


def test_a_large_segment_can_have_huge_pages_and_goes_with_its_last_view() -> None:
    fd = segment.create("large", 3 * HUGE_PAGE)
    memory = segment.attach(fd)
    os.close(fd)
    assert segment.address(memory) % HUGE_PAGE == 0
    assert len(memory) == 3 * HUGE_PAGE
    part = memory[5 : 3 * HUGE_PAGE : 7]
    del memory
    part[0] = 1
    assert _mappings() == 1
    del part
    assert _mappings() == 0


def test_huge_pages_change_no_byte_and_take_no_memory_that_was_not_reserved() -> None:
    size = 6 * HUGE_PAGE
    place = (HUGE_PAGE + PAGE, HUGE_PAGE + PAGE, 3)
    fd = segment.create("large", size, [place], places=1)
    with segment.attach(fd) as memory, segment.attach(fd) as other:
        memory[:HUGE_PAGE] = b"a" * HUGE_PAGE
        memory[-1] = 7
        before = os.fstat(fd).st_blocks
        segment.enlarge(memory, segment.in_use(size, [place], 1))
        assert os.fstat(fd).st_blocks == before
        assert other[:HUGE_PAGE] == b"a" * HUGE_PAGE
        assert other[-1] == 7
        assert other[HUGE_PAGE : 2 * HUGE_PAGE] == bytes(HUGE_PAGE)
    os.close(fd)


def test_all_who_attach_see_one_memory_and_the_descriptor_may_go() -> None:
    fd = segment.create("test", PAGE)
    with segment.attach(fd) as one, segment.attach(fd) as other:
        os.close(fd)
        one[17] = 5
        assert other[17] == 5


def test_a_killed_process_leaves_what_it_wrote() -> None:
    fd = segment.create("test", PAGE)
    code = f"import mmap, os; mmap.mmap({fd}, {PAGE})[0] = 9; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    ended = subprocess.run([sys.executable, "-c", code], pass_fds=(fd,))
    with segment.attach(fd) as memory:
        assert (ended.returncode, memory[0]) == (-signal.SIGKILL, 9)
    os.close(fd)


def test_nobody_can_change_the_size() -> None:
    """A segment cut short under others would be a SIGBUS in all of them."""
    fd = segment.create("test", 2 * PAGE)
    for size in (PAGE, 0, 3 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_the_descriptor_is_not_inherited_by_programs() -> None:
    fd = segment.create("test", 1)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_too_much_is_an_error_that_says_how_much_and_how_much_there_is() -> None:
    with pytest.raises(HostError) as caught:
        segment.create("AdamW over 9 parameters", 2**61)
    what = caught.value.what
    assert what.startswith("AdamW over 9 parameters needs 2,305,843,009,213.7 MB of shared memory; this machine has ")
    assert what.endswith(" MB left")
    assert caught.value.fix


def test_what_a_limit_forbids_is_an_error_that_says_how_much_and_leaks_nothing() -> None:
    """A limit on file sizes stands for any reason that the kernel has to refuse."""
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    try:
        with pytest.raises(HostError) as caught:
            segment.create("test", 5_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.what.startswith("test needs 5.0 MB of shared memory, which could not be reserved: ")
    assert len(os.listdir("/proc/self/fd")) == before


def test_something_is_available_here() -> None:
    assert 0 < segment.available_bytes() < 2**62


FILES = {
    "/proc/meminfo": "MemTotal: 16000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n",
    "/sys/fs/cgroup/memory.max": "3000000\n",
    "/sys/fs/cgroup/memory.current": "1000000\n",
    "/sys/fs/cgroup/memory.stat": "anon 1000000\nfile 0\nactive_file 0\ninactive_file 0\n",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 2_000_000),
        ({"/sys/fs/cgroup/memory.max": "max\n"}, 8000 * 1024),
        ({"/sys/fs/cgroup/memory.max": ""}, 8000 * 1024),
        ({"/sys/fs/cgroup/memory.max": "99000000\n"}, 8000 * 1024),
        ({"/sys/fs/cgroup/memory.current": "4000000\n"}, 0),
        # Pages of files are given back when memory is asked for: a container that has read its data is not full.
        (
            {
                "/sys/fs/cgroup/memory.current": "2900000\n",
                "/sys/fs/cgroup/memory.stat": "anon 1000000\nfile 1900000\nactive_file 0\ninactive_file 1900000\n",
            },
            2_000_000,
        ),
    ],
)
def test_what_is_left_is_what_host_and_container_leave(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], expected: int
) -> None:
    files = FILES | changed
    monkeypatch.setattr(segment, "_read", lambda path: files.get(path, ""))
    assert segment.available_bytes() == expected


@pytest.mark.parametrize(
    ("stripes", "places", "ranges"),
    [
        ((), 0, [(0, 100)]),
        (((40, 10, 4),), 0, [(0, 40), (80, 100)]),
        (((40, 10, 4),), 2, [(0, 60), (80, 100)]),
        (((40, 10, 6),), 6, [(0, 100)]),
        (((40, 10, 6),), 9, [(0, 100)]),
        (((60, 10, 4), (20, 10, 3)), 1, [(0, 30), (50, 70)]),
    ],
)
def test_what_belongs_to_places_that_nobody_has_is_not_in_use(
    stripes: tuple[tuple[int, int, int], ...], places: int, ranges: list[tuple[int, int]]
) -> None:
    assert segment.in_use(100, stripes, places) == ranges


def test_a_place_takes_memory_when_it_is_opened() -> None:
    fd = segment.create("test", 64 * PAGE, [(16 * PAGE, 8 * PAGE, 6)], places=2)
    try:
        assert os.fstat(fd).st_size == 64 * PAGE
        assert os.fstat(fd).st_blocks * 512 == 32 * PAGE
        segment.reserve_place(fd, "test", [(16 * PAGE, 8 * PAGE, 6)], 2)
        assert os.fstat(fd).st_blocks * 512 == 40 * PAGE
    finally:
        os.close(fd)
