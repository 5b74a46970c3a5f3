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
from collections.abc import Iterable
from pathlib import Path

import msgspec

from paceline.protocol import messages
from paceline.transport.frame import decode, encode, split

NAME = "launcher.diary"
LONG_BYTES = 1 << 23  # where it is worth shortening


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
    """Owns the file at ``path``, which need not be there yet. ``entries``: what it had when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.msgpack.Encoder()
        data = path.read_bytes() if path.exists() else b""
        self.entries, self.size_bytes = _decode(data)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self.size_bytes)

    def append(self, entry: Entry) -> None:
        data = self._framed(entry)
        self._file.write(data)
        self.size_bytes += len(data)

    def shorten(self, merged: bytes, saved: int) -> None:
        """Write it anew without the rows of steps, of which the merger has made ``merged``, and the parts of
        checkpoints up to number ``saved``."""
        entries, _ = _decode(self._path.read_bytes())
        last = entries[-1]
        rest = Entry(last.time_s, "launcher", 0, b"", last.places, merged=merged)
        new = self._path.with_suffix(".new")
        new.write_bytes(b"".join(self._framed(entry) for entry in (*without_rows(entries, saved), rest)))
        os.replace(new, self._path)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self.size_bytes = self._path.stat().st_size

    def close(self) -> None:
        self._file.close()

    def _framed(self, entry: Entry) -> bytes:
        data = self._encoder.encode(entry)
        return len(data).to_bytes(4, "little") + data


def without_rows(entries: Iterable[Entry], saved: int) -> list[Entry]:
    """The same, as far as the coordinator is concerned: that a worker gets on counts twice after each end of a process.

    What was logged goes with the rows.
    """
    kept = []
    told: Counter[int] = Counter()
    for place, entry in enumerate(entries):
        if place == 0:
            kept.append(entry)
            continue
        frames = b""
        for message in entry.messages:
            match message:
                case messages.Logged() | messages.Kept():
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
            kept.append(msgspec.structs.replace(entry, frames=frames))
    return kept


def _decode(data: bytes) -> tuple[list[Entry], int]:
    """The whole entries in the file's bytes, and how many bytes they take."""
    entries, start = [], 0
    while len(data) - start >= 4:
        stop = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if len(data) < stop:
            break
        entries.append(msgspec.msgpack.decode(memoryview(data)[start + 4 : stop], type=Entry))
        start = stop
    return entries, start
