"""Memory shared by the processes of one host: sealed-size memfds, reserved before they are touched.

``multiprocessing.shared_memory`` is not used: on CPython 3.11 its resource tracker unlinks a segment under
its living creator when any attached process ends. A memfd has no name, so nothing is left behind by a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from paceline.errors import HostError

# Ranges of a segment that have a part for every place: (where the first begins, bytes of each, how many). The parts of
# places that nobody has had are not reserved.
Stripes: TypeAlias = "Sequence[tuple[int, int, int]]"

PAGE = 4096


def page_up(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE


def create(name: str, size_bytes: int, by_place: Stripes = (), places: int = 0) -> int:
    """A descriptor of a new zeroed segment, its memory reserved; of ``by_place`` that of the first ``places``.

    Reserving first turns "out of memory" into an error with a sentence; without it the first touch past
    what the host has would be a SIGBUS. Raises HostError.
    """
    import fcntl  # not everywhere that a script runs alone

    fd = os.memfd_create(f"paceline-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        whole = page_up(max(size_bytes, 1))
        _reserve(fd, name, in_use(whole, by_place, places), whole)
    except HostError:
        os.close(fd)
        raise
    # Cut short under others it would be a SIGBUS in all of them.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def reserve_place(fd: int, name: str, by_place: Stripes, place: int) -> None:
    """Reserve what belongs to one more place. Raises HostError."""
    _reserve(fd, name, [(start + place * each, start + (place + 1) * each) for start, each, _ in by_place])


def in_use(size_bytes: int, by_place: Stripes, places: int) -> list[tuple[int, int]]:
    """The ranges ``[start, stop)`` of a segment but for the places from ``places`` on."""
    ranges, before = [], 0
    for start, each, count in sorted(by_place):
        ranges.append((before, start + min(places, count) * each))
        before = start + count * each
    return [(start, stop) for start, stop in (*ranges, (before, size_bytes)) if start < stop]


def _reserve(fd: int, name: str, ranges: Sequence[tuple[int, int]], whole: int = 0) -> None:
    size_bytes, free = sum(stop - start for start, stop in ranges), available_bytes()
    if size_bytes > free:
        raise HostError(
            f"{name} needs {_mb(size_bytes)} of shared memory; this machine has {_mb(free)} left",
            why="parameters and optimizer state are kept once, gradients once per worker",
            fix="fewer workers, a smaller model, or an optimizer with less state",
        )
    try:
        if whole:
            os.ftruncate(fd, whole)
        for start, stop in ranges:
            os.posix_fallocate(fd, start, stop - start)
    except OSError as error:
        raise HostError(
            f"{name} needs {_mb(size_bytes)} of shared memory, which could not be reserved: {error.strerror}",
            why="a memory limit of this container or user",
            fix="raise the limit, or use fewer workers or a smaller model",
        ) from None


def attach(fd: int) -> mmap.mmap:
    """Map the whole segment, readable and writable. The descriptor may be closed afterwards. Raises HostError."""
    size_bytes = os.fstat(fd).st_size
    try:
        return mmap.mmap(fd, size_bytes)
    except OSError as error:
        raise HostError(
            f"{_mb(size_bytes)} of shared memory could not be mapped: {error.strerror}",
            why="a limit of this process's address space (ulimit -v) or of its mappings",
            fix="raise the limit, or use fewer workers or a smaller model",
        ) from None


def address(memory: mmap.mmap) -> int:
    """Where the mapping begins in this process, for futexes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def available_bytes() -> int:
    """What can still be allocated: the kernel's estimate, or less if a control group allows less."""
    free = 2**62
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        # Pages of files count as used and are given back when memory is asked for.
        stat = dict(line.split() for line in _read("/sys/fs/cgroup/memory.stat").splitlines())
        free = min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return max(free, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
