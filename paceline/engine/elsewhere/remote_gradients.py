"""A worker elsewhere's gradients on their way home: with a step, before it, or as what local steps have come to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from paceline.engine.elsewhere.around import has_tables
from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.line import Line
from paceline.engine.elsewhere.mail import Letters, send_range
from paceline.engine.elsewhere.outbox import Outbox
from paceline.engine.elsewhere.owners import Owners
from paceline.engine.elsewhere.range_links import Spread
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.protocol import remote
from paceline.protocol.rounds import NEVER
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link


class RemoteGradients:
    """Of worker ``rank``. Where its parameters lie in home's memory its gradients do too, and home is only told."""

    def __init__(self, link: Link, line: Line, rank: int) -> None:
        self._link, self._line, self._rank = link, line, rank
        self.letters = Letters(link)  # what is small goes with what is asked next
        self._outboxes: dict[int, Outbox] = {}  # by exchange, of those whose host's gradients this process folds

    def _give(self, one: RemoteExchange) -> tuple[bytes, dict[int, int], bool]:
        """Have them where home, or this host, looks for them: what is not there yet. Which parameters have one, their
        rows, and whether they are offered, as in ``remote.Step``."""
        rest = one.gather()
        if one.spread is not None and one.is_finite:
            return bytes(one.replica.slot.mask), self._spread_out(one, one.spread, rest), True
        offers = self._may_offer(one) and one.is_finite
        if one.is_shared_out and one.is_measured and (rest or has_tables(one.spec)):
            offers = False  # the fold of it is not made twice
        if offers and one.owns is not None and one.fold is None:
            one.owns.give(one.buckets.index(bucket) for bucket in rest)
        elif offers:
            one.tell_all_ready(self._rank)
        elif one.owns is not None:
            self._send_apart(one, one.owns)
        elif one.is_home:
            one.lay_own()
            one.tell_all_ready(self._rank)
        elif one.host is not None:
            self._put_own(one)
        else:
            with self._line.kept():
                for what, tensor, start, stop in one.gradients(rest):
                    self.letters.add(what, tensor, start, stop)
        return bytes(one.replica.slot.mask), one.rows(), offers

    def _spread_out(self, one: RemoteExchange, spread: Spread, rest: Sequence[Bucket]) -> dict[int, int]:
        """To the servers that step it, which have all of it then; how many rows of tables went home. Of what is asked
        for behind this, home takes it that they have."""
        slot = one.replica.slot
        with self._line.kept():
            for bucket in rest:
                spread.put(self._link, bucket, slot.gradient)
            counts = spread.put_rows(self._link, slot)
            spread.flush()
        return counts

    @staticmethod
    def _may_offer(one: RemoteExchange) -> bool:
        return one.host is not None or one.is_shared_out

    def _send_apart(self, one: RemoteExchange, owners: Owners) -> None:
        """In no fold of theirs, as it is in the slot."""
        owners.off()
        if one.is_home:
            one.lay_own()
        else:
            self._put(one, one.whole)

    def bring(self, one: RemoteExchange, *, void: bool) -> remote.Step:
        """What is asked for with them, as they are at the step. Those of which a norm was asked are there already."""
        settings = one.changed_settings()
        if void:
            if one.owns is not None:
                one.owns.off()
            return remote.Step(one.index, True, b"", {}, settings)
        one.clip()
        factor = one.factor()
        if factor is not None:
            mask, offers = bytes(one.replica.slot.mask), self._may_offer(one)
            return remote.Step(one.index, False, mask, {}, settings, offers, factor, one.is_finite)
        mask, rows, offers = self._give(one)
        return remote.Step(one.index, False, mask, rows, settings, offers, finite=one.is_finite)

    def measure(self, one: RemoteExchange, chosen: bytes, order: float) -> remote.Norm:
        """What is asked for with them, as they are when the script asks for a norm."""
        mask, rows, offers = self._give(one)
        if one.spread is not None and offers:
            self._put(one, one.whole)  # all of it: the norm is taken at home
            rows = one.rows()
        one.measured()
        return remote.Norm(one.index, mask, rows, chosen, order, offers)

    def fold(self, one: RemoteExchange) -> None:
        """From now on this process sends what its host's workers bring, folded."""
        mirror, memory = one.host, one.memory
        assert mirror is not None
        name, number = f"gradient/{one.index}", max(memory.stepped) + 1
        self._outboxes[one.index] = Outbox(memory, one.spec.table, mirror.members, name, self._link, number)

    def send_fold(self, asked: remote.SendFold, one: RemoteExchange) -> None:
        """What differs from what has been sent before."""
        assert one.host is not None
        self._outboxes[one.index].finish(asked.number, dict(zip(one.host.members, asked.weights, strict=True)))

    def send_own(self, one: RemoteExchange) -> None:
        """This worker's gradient, in no fold, as it is in the slot."""
        if one.owns is not None:
            self._send_apart(one, one.owns)
        elif not one.is_home:
            self._put_own(one)

    def stepped(self, one: RemoteExchange) -> None:
        """The mirror of this host has the newest values: what its workers bring next may go."""
        outbox = one.fold or self._outboxes.get(one.index)
        if outbox is not None:
            outbox.allow(max(one.memory.stepped) + 1)

    def leave(self, one: RemoteExchange) -> None:
        """This worker's gradients go alone from now on."""
        outbox = self._outboxes.pop(one.index, None)
        if outbox is not None:
            outbox.finish(NEVER, {})
            outbox.stop()
        if one.early is not None:
            one.replica.before_rewriting = self._await_home

    def stop(self) -> None:
        """Nothing goes any more."""
        while self._outboxes:
            self._outboxes.popitem()[1].stop()

    def send_early(self, one: RemoteExchange) -> None:
        """From now on also in the midst of backward, bucket by bucket."""
        one.send_early(self._tell_early)
        if one.owners is not None and one.fold is None:
            one.replica.before_rewriting = lambda: self._await_owners(one)
        elif one.spread is not None:
            one.replica.before_rewriting = lambda: self._await_servers(one)
        elif not one.lies_with_others:
            one.replica.before_rewriting = self._await_home

    def bring_local(self, one: RemoteExchange, notes: list[remote.Note]) -> None:
        """What local steps have come to goes with the last of them that counts: home may close the period."""
        for place in range(len(notes) - 1, -1, -1):
            note = notes[place]
            if isinstance(note, remote.LocalStep) and note.exchange == one.index and not note.void and note.bad is None:
                one.write_local()
                self._put(one, one.whole)
                notes[place] = msgspec.structs.replace(note, brings=True, mask=bytes(one.replica.slot.mask))
                return

    def _put_own(self, one: RemoteExchange) -> None:
        """In place of what has been sent of the fold, of which nothing more may come: it would lie over this."""
        outbox = self._outboxes.get(one.index)
        if outbox is not None:
            outbox.finish(max(one.memory.stepped) + 1, {})
        self._put(one, one.whole)
        if outbox is not None:
            outbox.replaced(one.replica.slot.gradient)

    def _put(self, one: RemoteExchange, some: Sequence[Bucket]) -> None:
        with self._line.kept():
            for what, tensor, start, stop in one.gradients(some):
                send_range(self._link, what, tensor, start, stop)

    def _tell_early(self, one: RemoteExchange, place: int) -> None:
        """A bucket of gradients is in the slot."""
        if one.owns is not None and one.fold is None:
            one.owns.tell([place])
            return
        if one.lies_with_others:
            one.tell_ready(self._rank, place)
            return
        bucket = one.buckets[place]
        with suppress(LinkEnded):  # the step finds it out
            if one.spread is not None:
                one.spread.put(self._link, bucket, one.replica.slot.gradient)
                return
            name, vector = f"gradient/{one.index}/{bucket.vector}", one.replica.slot.gradient[bucket.vector]
            send_range(self._link, name, vector, bucket.start, bucket.stop)

    def _await_home(self) -> None:
        """Until home has all that was sent: what is sent may be written again, the same, until then."""
        with self._line.kept():
            self._link.flush()

    def _await_servers(self, one: RemoteExchange) -> None:
        """The same, of servers elsewhere too."""
        assert one.spread is not None
        with self._line.kept():
            one.spread.flush()
            self._link.flush()

    def _await_owners(self, one: RemoteExchange) -> None:
        """The same, of the workers of other hosts too."""
        if one.owners is not None:
            one.owners.flush()
        self._await_home()
