"""A worker elsewhere's gradients on their way home: with a step, before it, or as what local steps have come to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.line import Line
from paceline.engine.elsewhere.mail import send_range
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.protocol import remote
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link


class RemoteGradients:
    """Of worker ``rank``. Where its parameters lie in home's memory its gradients do too, and home is only told."""

    def __init__(self, link: Link, line: Line, rank: int) -> None:
        self._link, self._line, self._rank = link, line, rank

    def send(self, one: RemoteExchange) -> tuple[bytes, dict[int, int]]:
        """What of them home has not got yet. Which parameters have one, and their rows, as in ``remote.Step``."""
        rest = one.gather()
        if one.is_home:
            one.tell_all_ready(self._rank)
        else:
            self._put(one, rest)
        return bytes(one.replica.slot.mask), one.rows()

    def send_early(self, one: RemoteExchange) -> None:
        """From now on also in the midst of backward, bucket by bucket."""
        one.send_early(self._tell_early)
        if not one.is_home:
            one.replica.before_rewriting = self._await_home

    def bring(self, one: RemoteExchange, notes: list[remote.Note]) -> None:
        """What local steps have come to goes with the last of them that counts: home may close the period."""
        for place in range(len(notes) - 1, -1, -1):
            note = notes[place]
            if isinstance(note, remote.LocalStep) and note.exchange == one.index and not note.void and note.bad is None:
                one.write_local()
                self._put(one, one.whole)
                notes[place] = msgspec.structs.replace(note, brings=True, mask=bytes(one.replica.slot.mask))
                return

    def _put(self, one: RemoteExchange, some: Sequence[Bucket]) -> None:
        with self._line.kept():
            for what, tensor, start, stop in one.gradients(some):
                send_range(self._link, what, tensor, start, stop)

    def _tell_early(self, one: RemoteExchange, place: int) -> None:
        """A bucket of gradients is in the slot."""
        if one.is_home:
            one.tell_ready(self._rank, place)
            return
        bucket = one.buckets[place]
        with suppress(LinkEnded):  # the step finds it out
            name, vector = f"gradient/{one.index}/{bucket.vector}", one.replica.slot.gradient[bucket.vector]
            send_range(self._link, name, vector, bucket.start, bucket.stop)

    def _await_home(self) -> None:
        """Until home has all that was sent: what is sent may be written again, the same, until then."""
        with self._line.kept():
            self._link.flush()
