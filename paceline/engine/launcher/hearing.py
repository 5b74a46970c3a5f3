"""How the launcher hears: what has come is looked at, written down, obeyed and only then taken (``diary.py``).

So whenever it is killed, another knows from the diary what this one had heard, and finds in the sockets what it may
have obeyed in part only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TypeAlias

from paceline.engine.launcher.channels import ZYGOTE, Channels, forget
from paceline.engine.launcher.diary import Diary, Entry
from paceline.engine.launcher.memories import Memories
from paceline.engine.launcher.telling import Telling
from paceline.engine.launcher.watch import Whose
from paceline.protocol import messages
from paceline.protocol.rounds import LEFT
from paceline.transport.board import Board
from paceline.transport.channel import Peeked
from paceline.transport.frame import encode

_OWN = ("front", "launcher")  # entries of no channel that is looked at before it is read
Obey: TypeAlias = Callable[[Entry, messages.Any, tuple[int, ...]], None]


class Hearing:
    """``obey`` does what a message of an entry leads to; its descriptors are there the first time only."""

    def __init__(
        self, diary: Diary, channels: Channels, telling: Telling, board: Board, memories: Memories, obey: Obey
    ) -> None:
        self._diary, self._channels, self._telling = diary, channels, telling
        self._board, self._memories, self._obey = board, memories, obey

    def hear(self, whose: Whose) -> bool:
        """Write down what there is to read from a process, obey it, and take it. Was there anything?"""
        peeked = self._channels.peek(whose)
        if whose == ZYGOTE:
            peeked = self._before_an_end(peeked)
        if peeked:
            self._write(*whose, b"".join(one.frame for one in peeked), peeked)
            self._channels.consume(whose, peeked)
        return bool(peeked)

    def note(self, role: str, message: messages.Any) -> None:
        """The same of what comes by no channel that is looked at before: from the front, or of the launcher's own."""
        self._write(role, 0, encode(message))

    def shorten(self, saved: int) -> None:
        """The diary, if it is long: nothing of checkpoints up to number ``saved`` is needed any more."""
        if self._diary.is_long:
            self._diary.shorten(self._telling.merger.state(), saved)

    def go_on(self, alive: Mapping[Whose, int], held: dict[Whose, int]) -> None:
        """Come to where the launcher before this one was. ``alive`` grows meanwhile; ``held``: ends of channels."""
        # Only the last entry of a process may be obeyed in part; what came behind it, it led to.
        doubtful: list[Entry] = []
        self._be_silent(True)
        for entry in islice(self._diary.read(), 1, None):
            if entry.role not in _OWN:
                for earlier in doubtful:
                    self._obey_entry(earlier)
                doubtful = [entry]
            elif doubtful:
                doubtful.append(entry)
            else:
                self._obey_entry(entry)
        if doubtful:
            self._telling.recorder.expect(doubtful[0].places)
        self._channels.open_those([ZYGOTE, *alive], held)
        for entry in doubtful:
            peeked = self._channels.still_there(entry)
            self._be_silent(entry.role not in _OWN and not peeked)
            self._obey_entry(entry, peeked)
            self._channels.consume((entry.role, entry.rank), peeked)
        self._be_silent(False)
        self._channels.open_those([ZYGOTE, *alive], held)
        for fd in held.values():
            os.close(fd)

    def _be_silent(self, silent: bool) -> None:
        """What is long done is only read again."""
        self._channels.silent = self._telling.silent = silent

    def _before_an_end(self, peeked: list[Peeked]) -> list[Peeked]:
        """What a process said before it ended comes first: a traceback explains more than an exit status."""
        for place, one in enumerate(peeked):
            if isinstance(one.message, messages.Exited):
                whose = (one.message.role, one.message.rank)
                while place == 0 and self.hear(whose):
                    pass
                # What it left half done is undone first: one killed while it was leaving has not left.
                cut = place or int(self._memories.mend())
                forget(peeked[cut:])
                return peeked[:cut]
        return peeked

    def _write(self, role: str, rank: int, frames: bytes, peeked: Sequence[Peeked] = ()) -> None:
        """Write down what has come, and obey it."""
        left = [worker for worker, gone in enumerate(self._board.gone) if gone == LEFT] if role == "zygote" else []
        entry = Entry(self._telling.now(), role, rank, frames, self._telling.recorder.places, left)
        self._diary.append(entry)
        self._obey_entry(entry, peeked)

    def _obey_entry(self, entry: Entry, peeked: Sequence[Peeked] = ()) -> None:
        self._telling.at_s = entry.time_s
        if entry.merged:
            self._telling.merger.restore(entry.merged)
        for place, message in enumerate(one.message for one in peeked) if peeked else enumerate(entry.messages):
            self._obey(entry, message, peeked[place].descriptors if peeked else ())
        self._telling.flush()  # who finds the messages taken finds what they led to written
