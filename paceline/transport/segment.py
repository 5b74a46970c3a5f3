"""Memory shared by the processes of one host: sealed-size memfds, reserved before they are touched.

``multiprocessing.shared_memory`` is not used: on CPython 3.11 its resource tracker unlinks a segment under
its living creator when any attached process ends. A memfd has no name, so nothing is left behind by a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeAlias

from paceline.errors import HostError

# Ranges of a segment that have a part for every place: (where the first begins, bytes of each, how many). The parts of
# places that nobody has had are not reserved.
Stripes: TypeAlias = "Sequence[tuple[int, int, int]]"
Memory: TypeAlias = "mmap.mmap | memoryview"

PAGE = 4096
HUGE_PAGE = 2 << 20  # x86-64, and ARM with small pages of 4 KiB
_MADV_COLLAPSE = 25  # Linux 6.1; not in CPython 3.11's mmap


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


def attach(fd: int) -> memoryview:
    """Map the whole segment, readable and writable. The descriptor may be closed afterwards. Raises HostError."""
    size_bytes = os.fstat(fd).st_size
    try:
        return memoryview(mmap.mmap(fd, size_bytes)) if size_bytes < HUGE_PAGE else _map_aligned(fd, size_bytes)
    except OSError as error:
        raise HostError(
            f"{_mb(size_bytes)} of shared memory could not be mapped: {error.strerror}",
            why="a limit of this process's address space (ulimit -v) or of its mappings",
            fix="raise the limit, or use fewer workers or a smaller model",
        ) from None


def _map_aligned(fd: int, size_bytes: int) -> memoryview:
    """Where a huge page of the file can be one of this process: the kernel aligns such mappings only where an
    administrator has turned huge pages on for all shared memory."""
    libc = _libc()
    room = size_bytes + HUGE_PAGE
    start = libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if start == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    aligned = -(-start // HUGE_PAGE) * HUGE_PAGE
    mapped = libc.mmap(aligned, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if mapped == _MAP_FAILED:
        errno = ctypes.get_errno()
        libc.munmap(start, room)
        raise OSError(errno, os.strerror(errno))
    values = (ctypes.c_ubyte * size_bytes).from_address(aligned)
    weakref.finalize(values, libc.munmap, start, room).atexit = False  # when the last view of it is gone
    return memoryview(values).cast("B")


def own(size_bytes: int) -> mmap.mmap:
    """Memory of this process alone, of zeros; what is never written takes none. In huge pages, see ``enlarge``."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def enlarge(memory: Memory, ranges: Iterable[tuple[int, int]]) -> None:
    """Put ``[start, stop)`` of a mapping into huge pages as far as whole ones fit, in all processes that map it.

    A vector of parameters is 500 pages a megabyte, and who goes through several of them at once, as steps and folds do,
    spends half its time on finding where the pages are. Where the kernel cannot, or has no huge page left, everything
    stays as it is.
    """
    start = address(memory)
    for first, stop in ranges:
        lowest = -(-(start + first) // HUGE_PAGE) * HUGE_PAGE
        size = (start + stop - lowest) // HUGE_PAGE * HUGE_PAGE
        if size > 0:
            _libc().madvise(lowest, size, _MADV_COLLAPSE)


_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def address(memory: Memory) -> int:
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
