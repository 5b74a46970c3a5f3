"""The checkpoints of one run: folders that are whole or not there, and are read only if every byte is as written.

    RUN/checkpoints/step-00000812/   one checkpoint; a run that comes to step 812 again writes step-00000812-2
        model.safetensors            a group of tensors, named by the caller
        state.json                   a document, likewise
        manifest.json                written last: step, time, size and SHA-256 of every file, and its own SHA-256
    RUN/checkpoints/.new-...         being written; a leftover if its writer was killed
    RUN/checkpoints/.old-...         being removed; likewise

A folder gets its name when all in it is on disk, and loses it before anything in it is removed; nothing is written
over. So a process may be killed, or the machine lose power, at any moment. Knows nothing of training or of torch:
tensors are buffers with a dtype and a shape (``safetensors.py``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

import msgspec

from paceline.engine.checkpoint.safetensors import Tensor, Unusable, decode, parse, to_pieces
from paceline.errors import ConfigError, HostError

_FORMAT = 1
_MANIFEST = "manifest.json"
_NEW, _OLD = ".new-", ".old-"
_FOLDER = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?")
_FILE = re.compile(r"[A-Za-z0-9._-]+\.(?:safetensors|json)")
_NAME_CHARACTERS = 128
_MANIFEST_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 22
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that is as it was written.

    The tensors' data are read-only memoryviews of the mapped files, which stay while a view does, even if the
    checkpoint is removed. ``warnings``: a sentence for each newer checkpoint that could not be used.
    """

    path: Path
    step: int
    time: str
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, Any]
    warnings: list[str]


class Checkpoints:
    """The checkpoints in ``run_directory``, of which the ``keep`` newest stay. One process at a time may write."""

    def __init__(self, run_directory: Path, keep: int = 2) -> None:
        assert keep >= 1
        self.directory = run_directory / "checkpoints"
        self._keep = keep

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> Path:
        """Write a checkpoint of groups of tensors and of documents, by the stems of their files; its folder.

        Blocks until it is on disk; nothing in it may change until then. Documents are what msgspec can encode (it
        writes NaN as null), or JSON as ``bytes``. Afterwards too old ones are removed, and those of this step or a
        later one: the run has come from an earlier step and left them behind. Raises HostError if the files cannot
        be written (what was there is untouched), or what goes cannot be removed (the new one is there), and ConfigError
        for a name, dtype or document that cannot be stored.
        """
        files = _files(tensors, documents)
        try:
            new = self._write(step, files)
        except OSError as error:
            raise self._unwritten(step, _size_bytes(files), error) from None
        try:
            self._retire(new)
        except OSError as error:
            raise HostError(
                f"{new} is written, but what it replaces could not be removed: {_words(error)}",
                fix=f"remove it by hand, or see who owns {self.directory}",
            ) from None
        return new

    def paths(self) -> list[Path]:
        """The folders of the checkpoints, oldest first, good or not. Raises HostError."""
        try:
            found = [self.directory / name for name in os.listdir(self.directory) if _FOLDER.fullmatch(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HostError(f"cannot read {self.directory}: {_words(error)}") from None
        return sorted(found, key=_place)

    def load(self, path: Path | None = None) -> Loaded:
        """The newest checkpoint that is as it was written, or the one at ``path``. Reads every byte.

        Raises ConfigError if there is none, or if the one at ``path`` is not as it was written.
        """
        if path is not None:
            try:
                return _read(path, [])
            except Unusable as reason:
                raise ConfigError(
                    f"the checkpoint {path} cannot be used: {reason}",
                    why="a checkpoint is used only if every file in it is as it was written",
                    fix="name another one, or the run, whose newest good one is then used",
                ) from None
        warnings: list[str] = []
        for newest in reversed(self.paths()):
            try:
                return _read(newest, warnings)
            except Unusable as reason:
                warnings.append(f"{newest.name} cannot be used: {reason}")
        if not warnings:
            raise ConfigError(f"there is no checkpoint in {self.directory}", fix="name a run that has written one")
        raise ConfigError(
            f"there is no good checkpoint in {self.directory}",
            why="; ".join(warnings),
            fix="bring back a copy of one of them, or start the run anew",
        )

    def _write(self, step: int, files: Mapping[str, list[memoryview]]) -> Path:
        """All of it but the removal of others. Raises OSError."""
        if not self.directory.exists():
            self.directory.mkdir()
            _sync(self.directory.parent)
        with contextlib.suppress(OSError):  # said once the new one is there, if it stays so
            self._sweep()
        # The run's own records are on this disk too: do not fill it up to find out that this does not fit.
        if _size_bytes(files) > self._free_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        attempts = [attempt for at, attempt in map(_place, self.paths()) if at == step]
        name = f"step-{step:08d}" + (f"-{max(attempts) + 1}" if attempts else "")
        new, temporary = self.directory / name, self.directory / (_NEW + name)
        try:
            temporary.mkdir()
            written = {name: _write_file(temporary / name, pieces) for name, pieces in files.items()}
            time = datetime.now().astimezone().isoformat(timespec="seconds")
            _write_file(temporary / _MANIFEST, [_seal(_Manifest(_FORMAT, step, time, written))])
            _sync(temporary)
            os.rename(temporary, new)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # if it has not become the new one
        _sync(self.directory)
        return new

    def _retire(self, new: Path) -> None:
        """Remove what ``new`` makes superfluous. Raises OSError."""
        present = self.paths()
        earlier = [path for path in present if _place(path)[0] < _place(new)[0]]
        kept = {new, *earlier[max(len(earlier) - (self._keep - 1), 0) :]}
        for path in present:
            if path not in kept:
                os.rename(path, self.directory / (_OLD + path.name))
        _sync(self.directory)  # the names are gone for good before any of the files is
        self._sweep()

    def _sweep(self) -> None:
        """Remove what is half written or half removed. Raises OSError."""
        for name in os.listdir(self.directory):
            path = self.directory / name
            if name.startswith((_NEW, _OLD)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _free_bytes(self) -> float:
        disk = os.statvfs(self.directory)
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else math.inf  # some file systems do not say

    def _unwritten(self, step: int, needed_bytes: int, error: OSError) -> HostError:
        what = f"the checkpoint of step {step} could not be written to {self.directory}: {_words(error)}"
        why, fix = "the checkpoints before it are as they were", "choose another --run-dir"
        if error.errno in _FULL:
            with contextlib.suppress(OSError):
                what += f"; it needs {_mb(needed_bytes)}, and {_mb(self._free_bytes())} are free"
            fix = "free some space, write fewer (a larger --checkpoint-every), or choose another --run-dir"
        return HostError(what, why=why, fix=fix)


class _File(msgspec.Struct, frozen=True):
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    """What manifest.json says, but for the last field of the object: the SHA-256 of all that is before it."""

    format: int
    step: Annotated[int, msgspec.Meta(ge=0)]
    time: str
    files: dict[str, _File]


def _files(tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> dict[str, list[memoryview]]:
    """The names of the files and what to write to each, in order. Raises ConfigError."""
    files = {f"{stem}.safetensors": to_pieces(f"{stem}.safetensors", group) for stem, group in tensors.items()}
    files |= {f"{stem}.json": [_document(f"{stem}.json", value)] for stem, value in documents.items()}
    for name in files:
        if not _is_file_name(name):
            raise ConfigError(
                f"a checkpoint cannot have a file named {name!r}",
                fix="1 to 128 letters, digits, dots, hyphens and underscores, no two dots in a row; not manifest.json",
            )
    return files


def _document(file: str, value: Any) -> memoryview:
    try:
        text = value if isinstance(value, bytes) else msgspec.json.encode(value)
        msgspec.json.decode(text)  # what cannot be read must not be written
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be written as JSON: {error}", fix="numbers, text, lists, and dictionaries of them"
        ) from None
    return memoryview(text)


def _seal(manifest: _Manifest) -> memoryview:
    """The bytes of the manifest's file, for people to read too."""
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=2).removesuffix(b"\n}")
    return memoryview(body + _last_field(body))


def _last_field(body: bytes) -> bytes:
    return b',\n  "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def _write_file(path: Path, pieces: Iterable[memoryview]) -> _File:
    """Write a new file; it is on disk when this returns. Raises OSError."""
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK_BYTES):
                chunk = piece[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                size_bytes += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _File(size_bytes, digest.hexdigest())


def _sync(folder: Path) -> None:
    """The names in the folder are on disk when this returns. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _read(path: Path, warnings: list[str]) -> Loaded:
    """The checkpoint in this folder, every byte of it checked. Raises Unusable."""
    with _opened(path.name or str(path), path, stat.S_ISDIR) as (folder, _):
        with _opened(_MANIFEST, _MANIFEST, stat.S_ISREG, folder) as (descriptor, size_bytes):
            if size_bytes > _MANIFEST_BYTES:
                raise Unusable(f"{_MANIFEST} has {size_bytes} bytes")
            manifest = _unseal(FileIO(descriptor, closefd=False).read())
        named = _FOLDER.fullmatch(path.name)
        if named and int(named[1]) != manifest.step:
            raise Unusable(f"{_MANIFEST} is that of step {manifest.step}")
        tensors: dict[str, dict[str, Tensor]] = {}
        documents: dict[str, Any] = {}
        for name, file in manifest.files.items():
            stem, _, kind = name.rpartition(".")
            if not _is_file_name(name):
                raise Unusable(f"{_MANIFEST} names a file {name!r}")
            data = _read_file(folder, name, file)
            if kind == "json":
                documents[stem] = decode(name, msgspec.json.Decoder(), data)
            else:
                tensors[stem] = parse(name, data)
    return Loaded(path, manifest.step, manifest.time, tensors, documents, warnings)


def _unseal(text: bytes) -> _Manifest:
    body, _, _ = text.rpartition(b",")
    if text != body + _last_field(body):
        raise Unusable(f"{_MANIFEST} is not as it was written")
    version = decode(_MANIFEST, msgspec.json.Decoder(dict[str, Any]), text).get("format")
    if version != _FORMAT:
        raise Unusable(f"{_MANIFEST} is of format {version}, and this version of paceline reads {_FORMAT}")
    manifest: _Manifest = decode(_MANIFEST, msgspec.json.Decoder(_Manifest), text)
    return manifest


def _read_file(folder: int, name: str, file: _File) -> memoryview:
    """Map a file when its size and its SHA-256 are those that the manifest gives."""
    with _opened(name, name, stat.S_ISREG, folder) as (descriptor, size_bytes):
        if size_bytes != file.size_bytes:
            raise Unusable(f"{name} has {size_bytes} bytes, and {file.size_bytes} were written")
        # Read, not mapped: a page that the disk cannot give back is then an error, not a SIGBUS.
        with FileIO(descriptor, closefd=False) as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest != file.sha256:
            raise Unusable(f"{name} is not as it was written: its SHA-256 is another")
        return memoryview(mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ) if size_bytes else b"")


@contextlib.contextmanager
def _opened(name: str, path: str | Path, is_kind: Any, folder: int | None = None) -> Iterator[tuple[int, int]]:
    """Descriptor and size of what is there itself: a link is not followed, a pipe not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(descriptor)
            if not is_kind(status.st_mode):
                raise Unusable(f"{name} is not a {'folder' if is_kind is stat.S_ISDIR else 'file'}")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise Unusable(f"{name} is missing") from None
    except OSError as error:
        words = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read: {_words(error)}"
        raise Unusable(f"{name} {words}") from None


def _is_file_name(name: str) -> bool:
    fits = _FILE.fullmatch(name) is not None and len(name) <= _NAME_CHARACTERS
    return fits and ".." not in name and name != _MANIFEST


def _place(path: Path) -> tuple[int, int]:
    """Orders folders of checkpoints: step, and how often it had been come to."""
    named = _FOLDER.fullmatch(path.name)
    assert named is not None
    return int(named[1]), int(named[2] or 1)


def _size_bytes(files: Mapping[str, list[memoryview]]) -> int:
    return sum(len(piece) for pieces in files.values() for piece in pieces)


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
