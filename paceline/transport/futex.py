"""Sleep until a word in shared memory changes: Linux's futex, which Python does not offer.

A process reads the word, checks what it waits for, and sleeps only if the word is still what it read; the
kernel compares under its own lock, so no wake-up is lost. The system call is also the memory barrier between
writing data and telling about it on machines that reorder stores.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

from paceline.errors import HostError

_CALL_NUMBER = {"x86_64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98, "ppc64le": 221}
_WAIT, _WAKE = 0, 1  # not the private variants: the word is shared by processes
_EVERYONE = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _system_call() -> tuple[ctypes._NamedFuncPointer, int]:
    number = _CALL_NUMBER.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None or sys.byteorder != "little":
        raise HostError(
            f"distributed runs need Linux on x86-64, ARM64, RISC-V or little-endian POWER; this is "
            f"{platform.system()} on {platform.machine()}",
            fix="run the script alone: python SCRIPT",
        )
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call, number


_call: ctypes._NamedFuncPointer | None = None
_number = 0


def _ready() -> ctypes._NamedFuncPointer:
    global _call, _number
    if _call is None:
        _call, _number = _system_call()
    return _call


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleep while the 32-bit word at ``address`` equals ``seen``, at most ``timeout_s`` seconds.

    May return early for no reason: the caller checks its condition in a loop.
    """
    span = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
    result = (_call or _ready())(
        _number, ctypes.c_void_p(address), _WAIT, ctypes.c_uint32(seen), ctypes.byref(span), None, 0
    )
    if result != 0:
        code = ctypes.get_errno()
        assert code in (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR), f"futex wait failed: errno {code}"


def wake(address: int) -> None:
    """Wake everyone who sleeps on the word at ``address``."""
    (_call or _ready())(_number, ctypes.c_void_p(address), _WAKE, _EVERYONE, None, None, 0)
