"""``--data served``: worker 0 alone can read the data, and sends the others their batches.

Each of the others asks for one batch after the other, over a Unix socket; a thread of worker 0's reads it for them, by
the same plan and the same leases by which the worker would have read it itself.

    question: [kind, epoch, leased]    "length", "dealt" (within a pass), "begin" (a pass), "next"
    answer:   a batch and its samples, or a number, or None at the end; or a sentence why not
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from paceline.data.loader import Count, share
from paceline.data.part import Part
from paceline.data.passes import Leases, Passes, Reading, one_pass
from paceline.errors import ConfigError
from paceline.transport.batches import decode, encode
from paceline.transport.board import Aborted

_LENGTH = struct.Struct("<Q")
_PEER = struct.Struct("3i")
_MAX_QUESTION = 1 << 10
_PATIENCE_S = 60.0  # for the others to connect, once all have asked for it


class _Elsewhere:
    """The passes of another worker, as this one needs to know them to read for it."""

    over = False

    def __init__(self) -> None:
        self.now = 0

    def epoch(self, loader: int) -> int:
        return self.now

    def begin(self, loader: int, length: int | None) -> bool:
        return True

    def drawn(self, loader: int, samples: int) -> None: ...

    def skip(self, loader: int) -> int:
        return 0

    def deal(self, loader: int) -> None: ...

    def fetching(self) -> None: ...

    def border(self) -> None: ...

    def fetched(self, loader: int) -> None: ...

    def needs_ghost(self, loader: int) -> bool:
        return False

    def leases(self, loader: int) -> None: ...

    def more(self, loader: int) -> bool:
        return False  # who reads the batches asks for itself

    def verdict(self, loader: int) -> None: ...

    def pending(self, loader: int) -> None: ...

    def end(self, loader: int) -> None: ...

    def leave(self, loader: int) -> None: ...


class Reader:
    """Worker 0's side: reads ``loader`` for all others, in threads of its own until they hang up."""

    def __init__(self, loader: Any, index: int, count: Count | None, part_of: Callable[[int], Part]) -> None:
        self.turn = threading.Lock()  # a data set need not bear two readers at once
        self.orders: dict[int, Any] = {}
        self._directory = Path(tempfile.mkdtemp(prefix="paceline-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(_PATIENCE_S)
        self.path = str(self._directory / "batches")
        self._listener.bind(self.path)
        self._listener.listen(256)
        self._read: Callable[[int, _Elsewhere], Any] = lambda rank, passes: share(
            loader, index, part_of(rank), passes, count, self.orders
        )
        self._threads: list[threading.Thread] = []

    def accept(self, leases: dict[int, Leases | None]) -> None:
        """Wait for the other workers (``leases``: theirs, by rank, where there are any) to connect."""
        for _ in leases:
            connection, _ = self._listener.accept()
            _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            rank = int.from_bytes(_exactly(connection, 4), "little")
            assert user == os.getuid(), "another user asks for batches"
            assert rank in leases, "batches are asked for by no worker"
            args = (connection, rank, leases[rank])
            thread = threading.Thread(target=self._serve, args=args, name=f"batches for {rank}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def in_turn(self, loader: Any) -> Any:
        """Worker 0's own loader, made to read in turn with the threads."""
        batches = loader.batches

        def one_by_one(leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
            given = batches(leases, skip)
            while True:
                with self.turn:
                    item = next(given, None)
                if item is None:
                    return
                yield item

        loader.batches = one_by_one
        return loader

    def join(self) -> None:
        """Blocks until the others have ended: until then they may ask."""
        for thread in self._threads:
            thread.join()

    def _serve(self, connection: socket.socket, rank: int, leases: Any) -> None:
        passes = _Elsewhere()
        loader: Any = None
        batches: Iterator[tuple[Any, int]] = iter(())
        with connection:
            while (question := _receive(connection)) is not None:
                kind, epoch, leased = msgspec.msgpack.decode(question, type=tuple[str, int, bool])
                try:
                    with self.turn:
                        loader = self._read(rank, passes) if loader is None else loader
                        passes.now = epoch
                        if kind == "length":
                            answer: Any = len(loader)
                        elif kind == "dealt":
                            answer = loader.dealt()
                        elif kind == "begin":
                            batches = loader.batches(leases if leased else None)
                            answer = True
                        else:
                            answer = next(batches, None)
                    data = encode(answer)
                except TypeError as error:
                    data = encode(["TypeError", str(error)])
                except Exception as error:  # noqa: BLE001  it is raised there, in the script that asked
                    data = encode([type(error).__name__, f"worker 0, reading for worker {rank}: {error}"])
                if not _send(connection, data):
                    return


class ServedBatches:
    """The loader of a worker without data: its batches come from worker 0."""

    def __init__(self, source: Any, index: int, passes: Passes, path: str, rank: int) -> None:
        self._source, self._index, self._passes = source, index, passes
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        self._connection.sendall(rank.to_bytes(4, "little"))
        self._reading = Reading()

    def __len__(self) -> int:
        return self._reading.length(lambda: int(self._ask("length")), lambda: int(self._ask("dealt")))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Any]:
        return one_pass(self, self._index, self._passes, self._batches, self._reading)

    def close(self) -> None:
        self._connection.close()

    def _batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Any, int]]:
        self._ask("begin", leased=leases is not None)
        self._passes.fetching()
        while (item := self._ask("next")) is not None:
            if skip:
                skip -= 1
            else:
                yield item

    def _ask(self, kind: str, *, leased: bool = False) -> Any:
        question = msgspec.msgpack.encode((kind, self._passes.epoch(self._index), leased))
        answer = _receive(self._connection) if _send(self._connection, question) else None
        if answer is None:
            raise Aborted("worker 0, who sends the batches, is gone")
        match decode(answer):
            case ["TypeError", str(text)]:
                raise TypeError(text)
            case [str(kind), str(text)]:
                raise ConfigError(f"{text} ({kind})")
            case other:
                return other


def _send(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(_LENGTH.pack(len(data)))
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _receive(connection: socket.socket) -> bytearray | None:
    """What was sent; None if the other side has hung up."""
    try:
        head = _exactly(connection, _LENGTH.size)
        return _exactly(connection, _LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None
    except ConnectionResetError:
        return None


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, place = memoryview(data), 0
    while place < count:
        got = connection.recv_into(view[place:])
        if not got:
            return bytearray()
        place += got
    return data
