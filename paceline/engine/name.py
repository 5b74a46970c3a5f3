"""What ``ps`` and ``top`` call a process of ours: all of a run are forked from one, and would have its name."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

_PR_SET_NAME = 15
_ARGUMENTS = 45  # where in /proc/self/stat, behind the name, stand the first address of the command line and the last


def name_process(name: str, program: Sequence[str] = ()) -> None:
    """Be called ``name`` (of which ``top`` shows 15 bytes), and as the command line that and what the ``program`` is.
    Where that cannot be, nothing happens."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = Path("/proc/self/cmdline").read_bytes()
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARGUMENTS]), int(fields[_ARGUMENTS + 1])
        # By the file and not by the address, which would have to be right.
        memory = os.open("/proc/self/mem", os.O_RDWR)
        try:
            if told and os.pread(memory, end - start, start) == told:
                words = b"\0".join(os.fsencode(word) for word in (name, *program))
                os.pwrite(memory, words[: len(told) - 1].ljust(len(told), b"\0"), start)
        finally:
            os.close(memory)
