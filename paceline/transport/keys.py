"""The job key: 32 secret bytes that every process of a job has and nobody else. What it gives is in ``tls.py``.

It comes in a file that only its owner can read (``PACELINE_JOB_KEY_FILE``) or in the environment
(``PACELINE_JOB_KEY``, hex or base64); never on a command line, which every user of a machine can read. It is in no
log, no ``repr`` and no message: all that may be shown is its fingerprint.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from paceline.errors import ConfigError

KEY_BYTES = 32
FILE_VARIABLE = "PACELINE_JOB_KEY_FILE"
VARIABLE = "PACELINE_JOB_KEY"
_MAX_FILE_BYTES = 1024
_HOW_TO_MAKE = "make one with: paceline key job.key"


class JobKey:
    """One trust domain. Compared, printed and copied it gives nothing away; it cannot be pickled."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        """Raises ConfigError if ``secret`` is not 32 bytes, or 32 times the same one."""
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"a job key has {len(secret)} bytes; it must have {KEY_BYTES}", fix=_HOW_TO_MAKE)
        if len(set(secret)) == 1:
            raise ConfigError(f"a job key is {KEY_BYTES} times the same byte; it must be random", fix=_HOW_TO_MAKE)
        self._secret = bytes(secret)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell keys apart and from which no key can be found. For logs."""
        return self.derive("fingerprint").hex()[:16]

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose, the same in every process (HKDF-SHA256, RFC 5869)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = b"paceline job key 1: " + purpose.encode()
        return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(self._secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobKey) and secrets.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self._secret)

    def __repr__(self) -> str:
        return f"JobKey(fingerprint={self.fingerprint!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a job key does not travel; every process reads it for itself")


def new_job_key(path: str | Path) -> JobKey:
    """Makes a key and its file, mode 0600. Raises ConfigError if the file exists or cannot be made."""
    secret = secrets.token_bytes(KEY_BYTES)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already", why="whoever uses that key would be locked out", fix="give another name"
        ) from None
    except OSError as error:
        raise ConfigError(f"the job key's file {path} cannot be made: {error.strerror}") from None
    with os.fdopen(fd, "w", encoding="ascii") as file:
        os.fchmod(fd, 0o600)  # whatever the umask is
        file.write(secret.hex() + "\n")
    return JobKey(secret)


def job_key(environment: Mapping[str, str]) -> JobKey | None:
    """The key that the environment names, or None if it names none. Raises ConfigError, never with the key in it."""
    path, text = environment.get(FILE_VARIABLE, ""), environment.get(VARIABLE, "")
    if path and text:
        raise ConfigError(f"{FILE_VARIABLE} and {VARIABLE} are both set", fix="unset one of them")
    if path:
        return read_job_key(path)
    return JobKey(_parsed(text, VARIABLE)) if text else None


def read_job_key(path: str | Path) -> JobKey:
    """The key in a file of ours that nobody else can read. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe nobody writes to: do not wait
    except OSError as error:
        raise ConfigError(f"the job key's file {path} cannot be read: {error.strerror}", fix=_HOW_TO_MAKE) from None
    try:
        _check(path, os.fstat(fd))  # of what was opened, not of what has that name now
        text = os.read(fd, _MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(text) > _MAX_FILE_BYTES:
        raise ConfigError(f"the job key's file {path} is longer than {_MAX_FILE_BYTES} bytes: it holds no job key")
    return JobKey(_parsed(text.decode("ascii", "replace"), str(path)))


def _check(path: str | Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"the job key's file {path} is not a regular file")
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"the job key's file {path} belongs to user {found.st_uid}; it must belong to user {os.geteuid()}",
            why="whoever owns it can read and replace the key",
            fix=f"copy it, and give the copy mode 0600: install -m 600 {path} COPY",
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o177:
        raise ConfigError(
            f"the job key's file {path} has mode {mode:04o}; it must be 0600",
            why="others could read the key, and with it join the job",
            fix=f"chmod 600 {path}",
        )


def _parsed(text: str, where: str) -> bytes:
    text = text.strip()
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(
            f"{where} holds {len(text)} characters that are no key; it must be {KEY_BYTES} bytes in hex or base64",
            fix=_HOW_TO_MAKE,
        ) from None
