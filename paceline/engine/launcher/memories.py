"""The memory of a run's collectives, as the launcher has it: made once a number, and kept for who comes later."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from paceline.protocol import messages
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel
from paceline.transport.lock import Lock


class Memories:
    """The front keeps what is made here, for another launcher."""

    def __init__(self, front: Channel, board: Board, lock: Lock) -> None:
        self._front, self._board, self._lock = front, board, lock
        self._kept: dict[int, tuple[messages.Memory, int]] = {}

    def __getitem__(self, number: int) -> tuple[messages.Memory, int]:
        """What is sent with its descriptor."""
        return self._kept[number]

    @property
    def newest(self) -> int:
        """The highest number; 0 before any."""
        return max(self._kept, default=0)

    def of_exchanges(self) -> Iterator[tuple[messages.Memory, int]]:
        return (kept for kept in self._kept.values() if kept[0].kind == "exchange")

    def keep(self, memory: messages.Memory, fd: int) -> None:
        """It has been made. What is half done under the run's lock in it can be undone from here on."""
        self._board.journal.map(memory.number, memoryview(segment.attach(fd)).cast("Q"))
        self._kept[memory.number] = memory, fd

    def mend(self) -> bool:
        """Undo what a process that has died has left half done under the run's lock. Is nothing half done now?"""
        if not self._board.journal.is_clean:
            self._lock.try_to_mend()
        return self._board.journal.is_clean

    def make(self, request: messages.Wrap) -> None:
        """Unless it is there. Raises HostError."""
        if request.number in self._kept:
            return
        memory = messages.Memory(request.number, request.size_bytes, request.kind, request.spec, request.by_place)
        fd = segment.create(request.what, request.size_bytes, request.by_place, self._board.width)
        self.keep(memory, fd)
        self._front.send(messages.Hold("memory", number=memory.number, about=msgspec.msgpack.encode(memory)), (fd,))

    def reserve_place(self, rank: int) -> None:
        """A worker is to come to a place that nobody has had. Raises HostError."""
        for memory, fd in self._kept.values():
            segment.reserve_place(fd, f"worker {rank}", memory.by_place, rank)

    def size_bytes(self, number: int) -> int:
        """Of what is reserved: what nobody has been given is not there."""
        return os.fstat(self._kept[number][1]).st_blocks * 512
