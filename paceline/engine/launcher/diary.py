"""What has come to the launcher, written down before it is obeyed, so that another launcher can go on from there.

    RUN/launcher.diary    entries, each behind its length; a last one that is cut short was never obeyed

An entry is what one channel had to read at one time. The order is: look at the messages in the socket, write the entry,
obey it, take the messages from the socket. So an entry whose messages are still in their socket may be obeyed in part
only, and every other one is obeyed. A launcher that takes over reads the entries again to know what the one before it
knew, and obeys the one that is in doubt once more: whatever it leads to may be done twice.

The file survives the process, not the machine: nothing is synced.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from paceline.protocol import messages
from paceline.transport.frame import decode, encode, split

NAME = "launcher.diary"
LONG_BYTES = 1 << 20  # where it is worth shortening
_LENGTH_BYTES = 4


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """``frames`` of one sender. ``time_s``: when it was written, since the run began; in the first entry, of the host's
    clock when the run began. ``places``: how far the files of the run were written. ``left``: the workers that were
    finished with the script. ``merged``: instead of what rows came before, what the merger had made of them."""

    time_s: float
    role: str
    rank: int
    frames: bytes
    places: dict[str, int] = {}
    left: list[int] = []
    merged: bytes = b""

    @property
    def messages(self) -> list[messages.Any]:
        return [decode(frame)[0] for frame in split(self.frames)]


class Diary:
    """Owns the file at ``path``, which need not be there yet, and is read an entry at a time, however long it is.
    ``first``: the one that it began with when it was opened, if it had any."""

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, path.with_suffix(".new")
        self._encoder = msgspec.msgpack.Encoder()
        self._new.unlink(missing_ok=True)  # of one that was killed while it shortened
        path.touch()
        self._long_bytes, self.size_bytes = LONG_BYTES, 0
        first = last = b""
        for data in _whole(path):
            first, last = first or data, data
            self.size_bytes += _LENGTH_BYTES + len(data)
        self.first, self._last = ((_decode(data) if data else None) for data in (first, last))
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self.size_bytes)

    def read(self) -> Iterator[Entry]:
        """What it has, in order."""
        return (_decode(data) for data in _whole(self._path))

    def append(self, entry: Entry) -> None:
        data = self._framed(entry)
        self._file.write(data)
        self.size_bytes += len(data)
        self._last = entry

    @property
    def is_long(self) -> bool:
        """Is it worth shortening? What cannot be left out is not gone through again and again."""
        return self.size_bytes > self._long_bytes

    def shorten(self, merged: bytes, saved: int) -> None:
        """Write it anew without the rows of steps, of which the merger has made ``merged``, and the parts of
        checkpoints up to number ``saved``. It must have an entry."""
        assert self._last is not None
        self._last = Entry(self._last.time_s, "launcher", 0, b"", self._last.places, merged=merged)
        with self._new.open("wb") as new:
            for entry in without_rows(self.read(), saved):
                new.write(self._framed(entry))
            new.write(self._framed(self._last))
        os.replace(self._new, self._path)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self.size_bytes = self._path.stat().st_size
        self._long_bytes = max(LONG_BYTES, 2 * self.size_bytes)

    def close(self) -> None:
        self._file.close()

    def _framed(self, entry: Entry) -> bytes:
        data = self._encoder.encode(entry)
        return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def without_rows(entries: Iterable[Entry], saved: int) -> Iterator[Entry]:
    """The same, as far as the coordinator is concerned: that a worker gets on counts twice after each end of a process.

    What was logged goes with the rows.
    """
    told: Counter[int] = Counter()
    for place, entry in enumerate(entries):
        if place == 0:
            yield entry
            continue
        frames = b""
        for message in entry.messages:
            match message:
                case messages.Logged() | messages.LoggedBehind() | messages.Kept():
                    continue
                case messages.Part(number=number) if number <= saved:
                    continue
                case messages.Steps():
                    told[entry.rank] += 1
                    frames += encode(messages.Steps(b"")) if told[entry.rank] <= 2 else b""
                    continue
                case messages.Exited():
                    told.clear()
            frames += encode(message)
        if frames:
            yield msgspec.structs.replace(entry, frames=frames)


def _whole(path: Path) -> Iterator[bytes]:
    """The entries in the file that are whole."""
    with path.open("rb") as file:
        while length := int.from_bytes(file.read(_LENGTH_BYTES), "little"):
            data = file.read(length)
            if len(data) < length:
                return
            yield data


def _decode(data: bytes) -> Entry:
    return msgspec.msgpack.decode(data, type=Entry)
