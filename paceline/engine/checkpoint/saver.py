"""The launcher's side of checkpoints: gathers the workers' parts of one, and writes it while training goes on.

A part comes as memory of its own: nothing in it changes any more. Knows no torch.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.safetensors import DTYPES, Tensor
from paceline.errors import PacelineError
from paceline.protocol import messages

PARTS = ("part", "shared part")  # what a worker has of its own, what all share: names that the front keeps them by
Tell = Callable[[str, str], None]  # kind, text


@dataclass
class _Gathered:
    missing: set[int]
    shared: bool = False
    step: int = 0
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)


class Saver:
    """``tell`` says to the user what became of it; called by ``turn`` and ``close``, on the caller's thread."""

    def __init__(self, checkpoints: Checkpoints, workers: int, tell: Tell) -> None:
        self._checkpoints, self._tell = checkpoints, tell
        self._present = set(range(workers))
        self._open: dict[int, _Gathered] = {}
        self._written = 0
        self.saved = 0  # nothing of checkpoints up to this one is needed any more
        self._next: _Gathered | None = None
        self._thread: threading.Thread | None = None
        self._said: list[tuple[str, str]] = []

    def take(self, rank: int, part: messages.Part, fd: int) -> None:
        """A worker's part has come; ``fd`` is its memory and is closed."""
        try:
            if part.number <= self._written:
                return
            gathered = self._open.setdefault(part.number, _Gathered(set(self._present)))
            memory = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))
        finally:
            os.close(fd)
        layout, documents = msgspec.msgpack.decode(part.layout)
        for stem, group in layout.items():
            gathered.tensors[stem] = {name: _tensor(memory, *where) for name, where in group.items()}
        gathered.documents |= documents
        if "state" in documents:
            gathered.shared, gathered.step = True, part.step
        if f"worker-{rank}" in documents:
            gathered.missing.discard(rank)
        self._finish()

    def joined(self, rank: int) -> None:
        """A worker has been added: it has a part in checkpoints that are begun from now on."""
        self._present.add(rank)

    def lost(self, rank: int, *, finished: bool = False) -> None:
        """A worker has died, or has come to its end: its part is not waited for."""
        if finished:
            self._present.discard(rank)
        for gathered in self._open.values():
            gathered.missing.discard(rank)
        self._finish()

    def turn(self) -> None:
        """Say what has become of what was being written, and write the next."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread.join()
            self._thread = None
        said, self._said = self._said, []
        for kind, text in said:
            self._tell(kind, text)
        if self._thread is None and self._next is None:
            self.saved = self._written
        if self._thread is None and self._next is not None:
            self._thread = threading.Thread(target=self._write, args=(self._next,))
            self._next = None
            self._thread.start()

    def close(self) -> None:
        """Return when all is written."""
        while self._thread is not None or self._next is not None:
            if self._thread is not None:
                self._thread.join()
            self.turn()
        self.turn()

    def _finish(self) -> None:
        whole = [number for number, gathered in self._open.items() if gathered.shared and not gathered.missing]
        if whole:
            self._written = max(whole)
            self._next = self._open[self._written]  # an older one that waits for its turn is not worth writing
            self._open = {number: gathered for number, gathered in self._open.items() if number > self._written}

    def _write(self, gathered: _Gathered) -> None:
        try:
            path = self._checkpoints.write(gathered.step, gathered.tensors, gathered.documents)
        except PacelineError as error:
            self._said.append(("alarm", ": ".join(part for part in (error.what, error.why, error.fix) if part)))
        else:
            self._said.append(("checkpoint", f"step {gathered.step} is saved in {path}"))


def _tensor(memory: memoryview, dtype: str, shape: list[int], place: int) -> Tensor:
    size = DTYPES[dtype][1] if dtype in DTYPES else 1
    for length in shape:
        size *= length
    return Tensor(dtype, tuple(shape), memory[place : place + size])
