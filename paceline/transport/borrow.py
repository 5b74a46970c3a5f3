"""Memory of another process of this host, mapped without that process's help: a memfd found through /proc.

The kernel lets a process open another's descriptors where it may also look into its memory: as the same user's.
"""

from __future__ import annotations

import os
from pathlib import Path

from paceline.transport import segment


def this_host() -> str:
    """A name for what can share memory: this boot of this kernel, and the container that this process is in. Two
    network namespaces are two hosts."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    inside = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net")]
    return f"{boot}/{inside[0]}/{inside[1]}"


def can_borrow(pid: int, fd: int) -> bool:
    """May this process map that one's memfd?"""
    try:
        os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def borrow(pid: int, fd: int) -> memoryview:
    """All of it, readable and writable. Raises OSError, HostError."""
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return segment.attach(own)
    finally:
        os.close(own)
