"""A host's part in folding what all hosts bring, each a share (protocol/owners.py): what of it goes where, and when.

    backward -> own slot, or the fold of a host's workers (host_fold.py) --parts--> inboxes of the owners
    inboxes -> fold (a thread of its own) --folds--> "folds" of all hosts

Gradients are sent from the slot, and folds from where they are made, without a copy: neither is written again before a
round later, which nobody comes to that has not got all of this one. Where a round was not pushed as one that does not
hold, but then nobody uses what may still come of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.mail import as_bytes
from paceline.engine.elsewhere.peers import Peers, Post
from paceline.engine.elsewhere.table_parts import TableParts
from paceline.params.fold import Pushed, fold_into
from paceline.params.rows import Rows
from paceline.params.table import Table, vector_dtype
from paceline.protocol import owners
from paceline.protocol.link import Senseless

SHARE_BYTES = 2**19  # of one owner in one cell, at most
PIECE_BYTES = 2**21  # of rows
_LOOK_S = 0.5
FOLDS = 0  # in whose slot the folds of all lie, where they are stepped with

Vectors = Mapping[str, torch.Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """Values ``[start, stop)`` of a vector."""

    vector: str
    start: int
    stop: int


class Owners:
    """Of exchange ``index``. Owners are ``members``, the first workers of all hosts; the ``folds`` of all are brought
    there, rows with their numbers. ``buckets``: what dense gradients are told by. ``is_lost``: is home, or are links to
    others?"""

    def __init__(
        self,
        index: int,
        peers: Peers,
        table: Table,
        buckets: Sequence[Bucket],
        folds: Pushed,
        is_lost: Callable[[], bool],
    ) -> None:
        self._index, self._peers, self._rank, self._is_lost = index, peers, peers.rank, is_lost
        self.members = sorted([self._rank, *peers.others])
        self._cells, self._cells_of = _cut(buckets, len(self.members))
        self._folds = {vector: folds.gradient[vector] for vector in table.dense_sizes}
        self._own: Vectors = self._folds  # its own gradients are not known before ``use``
        entries = [(param, entry) for param, entry in enumerate(table.entries) if entry.row]
        tables = [TableParts(param, entry, self._rank, self.members, folds) for param, entry in entries]
        self._tables = dict(enumerate(tables, len(self._cells)))  # by their number as cells, after the others
        shares = [self._share(cell, self._rank) for cell in range(len(self._cells))]
        owned = [cell for cell, (start, stop) in enumerate(shares) if stop > start]
        self._inbox = {
            (other, cell): torch.zeros(shares[cell][1] - shares[cell][0], dtype=vector_dtype(self._cells[cell].vector))
            for other in peers.others
            for cell in owned
        }
        # Where what comes belongs, by who sends it, whether it is a fold, and the cell.
        self._places = {(other, False, cell): as_bytes(room) for (other, cell), room in self._inbox.items()}
        for other in peers.others:
            for cell, where in enumerate(self._cells):
                start, stop = self._share(cell, other)
                self._places[other, True, cell] = as_bytes(self._folds[where.vector][start:stop])
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # who waits for the whole
        self._has_work = threading.Condition(lock)  # the thread that folds
        self._gathering = owners.Gathering(self._rank, self.members, [*owned, *self._tables])
        self._over = False
        self.is_on = False  # is the next round to be folded?
        self.has_missed = False  # a round that home has stepped
        self._sent: dict[int, int] = {}  # of which round a fold was sent last, by cell
        self._rows_told = 0  # in which round
        self._folds_post = Post(peers, index)  # of the thread that folds
        self._bytes: dict[tuple[bool, int, int], memoryview] = {}  # shares of cells, of its own gradients or of folds
        self._thread = threading.Thread(target=self._fold_forever, name="paceline-owner", daemon=True)
        peers.add(index, self)

    def use(self, own: Vectors, own_rows: Callable[[int], Rows]) -> None:
        """The gradients are written there, this worker's or the fold of its host's; ``own_rows(param)``, of a table."""
        self._own, self._own_rows, self._bytes = own, own_rows, {}
        self._thread.start()

    def stop(self) -> None:
        self.is_on = False
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
            self._has_work.notify_all()

    @property
    def number(self) -> int:
        """The round that is to come."""
        return self._gathering.number

    def begin(self, number: int, *, is_on: bool) -> None:
        """All rounds before this are over."""
        with self._changed:
            self.is_on = is_on
            if number != self._gathering.number:
                self._gathering.begin(number)
                self._changed.notify_all()
                self._wake()

    def _wake(self) -> None:
        """Whoever has something to do by now: to be woken for nothing, and by each of all, takes longer than that."""
        gathering = self._gathering
        if gathering.has_next or gathering.is_folded:
            self._has_work.notify_all()
        if gathering.is_whole(gathering.number) or gathering.is_off(gathering.number):
            self._changed.notify_all()

    # --- own gradients ---

    def tell(self, places: Iterable[int]) -> None:
        """The gradients of these buckets are there, perhaps others than before."""
        post = Post(self._peers, self._index)
        self._tell(post, places)
        post.send()

    def _tell(self, post: Post, places: Iterable[int]) -> None:
        number = self.number
        for place in places:
            for cell in self._cells_of[place]:
                said = owners.Part(self._index, number, cell)
                for other in self._peers.others:
                    if part := self._bytes_of(self._own, cell, other):
                        post.put(other, said, part)
                self.heard(self._rank, said, 0)

    def give(self, places: Iterable[int]) -> None:
        """All of them are as they are to be; those of these buckets have not been told so, nor have rows."""
        post, given = Post(self._peers, self._index), owners.Given(self._index, self.number)
        self._tell(post, places)
        self._tell_rows(post)
        post.put_to_all(given)
        post.send()
        self.heard(self._rank, given, 0)

    def _tell_rows(self, post: Post) -> None:
        number = self.number
        if self._tables and self._rows_told == number:
            self._peers.flush()  # they are written over
        self._rows_told = number
        for cell, table in self._tables.items():
            count, payload = table.give(self._own_rows(table.param))
            size = len(payload)
            for start in range(0, max(size, 1), PIECE_BYTES):
                stop = min(start + PIECE_BYTES, size)
                said = owners.Rows(self._index, number, cell, count, start, stop == size)
                for other in self._peers.others:
                    post.put(other, said, payload[start:stop])
            self.heard(self._rank, said, 0)

    def finish(self, number: int, weights: Sequence[float]) -> bool:
        """With these weights the round counts. True when the folds of all are here, False if they will not be."""
        total = sum(weights)
        with self._changed:
            self._gathering.settle(number, [weight / total for weight in weights])
            self._wake()
        return self.await_whole(number)

    def await_whole(self, number: int) -> bool:
        """The same."""
        with self._changed:
            while not self._gathering.is_off(number):  # what is whole may be of a norm that was asked before
                if self._gathering.is_whole(number):
                    return True
                if self._over or self._is_lost():
                    return False
                self._changed.wait(_LOOK_S)
            return False

    def lay_folds(self, slot: Pushed) -> None:
        """Put them there: home steps with them."""
        for vector, folds in self._folds.items():
            slot.gradient[vector].copy_(folds)
        for table in self._tables.values():
            table.lay_fold(slot)

    def off(self) -> None:
        """This worker brings its own gradient to the round. Waits until what was sent of it has arrived."""
        off = owners.Off(self._index, self.number)
        for other in self._peers.others:
            self._peers.send(other, off)
        self.heard(self._rank, off, 0)
        self.flush()

    def flush(self) -> None:
        """Until the others have what was sent to them."""
        self._peers.flush()

    # --- what the others send; by the links' threads ---

    def changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def place(self, sender: int, message: Any, size_bytes: int) -> memoryview | None:
        room = None
        if isinstance(message, owners.Rows):
            table = self._tables.get(message.cell)
            return None if table is None else table.place(sender, message.count, message.start, size_bytes)
        if isinstance(message, owners.Part | owners.Fold):
            room = self._places.get((sender, isinstance(message, owners.Fold), message.cell))
        return room if room is not None and len(room) == size_bytes else None

    def heard(self, sender: int, message: Any, size_bytes: int) -> None:
        if isinstance(message, owners.Letter):
            for one in message.enclosed:
                self._open(sender, one)
            return
        if isinstance(message, owners.Part | owners.Fold) and not size_bytes and sender != self._rank:
            raise Senseless(
                f"a {type(message).__name__} of cell {message.cell} came from worker {sender} without values"
            )
        if isinstance(message, owners.Fold):
            return  # of which Folded tells
        gathering = self._gathering
        with self._changed:
            match message:
                case owners.Rows(number=number, cell=cell):
                    if sender != self._rank and not self._take_rows(sender, message, size_bytes):
                        return
                    gathering.part(sender, number, cell)
                case owners.Part(number=number, cell=cell):
                    gathering.part(sender, number, cell)
                case owners.Given(number=number):
                    gathering.given(sender, number)
                case owners.Folded(number=number):
                    gathering.folded(sender, number)
                case owners.Off(number=number):
                    gathering.off(sender, number)
            if not isinstance(message, owners.Part | owners.Rows):
                self._wake()
            elif gathering.has_next:
                self._has_work.notify_all()

    def _open(self, sender: int, one: owners.Enclosed) -> None:
        if one.data:
            room = self.place(sender, one.said, len(one.data))
            if room is None:
                raise Senseless(
                    f"worker {sender} has enclosed {len(one.data)} bytes of a {type(one.said).__name__}, which are not"
                    " expected"
                )
            room[:] = one.data
        self.heard(sender, one.said, len(one.data))

    def _take_rows(self, sender: int, said: owners.Rows, size_bytes: int) -> bool:
        """Are these the last of them?"""
        if said.cell not in self._tables:
            raise Senseless(f"worker {sender} has sent rows of cell {said.cell}, which is no table")
        self._tables[said.cell].take(sender, said, size_bytes)
        return said.ends

    # --- folding ---

    def _fold_forever(self) -> None:
        try:
            while (work := self._next()) is not None:
                number, shares, cell, ticket = work
                self._fold(number, cell, shares)
                with self._changed:
                    self._gathering.fold(number, cell, ticket, shares)
        except Exception:  # the outermost line of a thread; without it no fold will be whole
            logger.exception("folding a share of what all hosts bring")
            self.has_missed = True
            self._end()

    def _next(self) -> tuple[int, Sequence[float], int, int] | None:
        """The next to fold, with the round, the shares and the ticket; None at the end."""
        gathering = self._gathering
        while True:
            with self._has_work:
                if self._over:
                    return None
                number = gathering.number
                if gathering.has_next:
                    return number, gathering.shares, *gathering.next()
                is_folded = gathering.is_folded
            if is_folded:
                self._folds_post.put_to_all(owners.Folded(self._index, number))
            self._folds_post.send()
            if is_folded:
                self.heard(self._rank, owners.Folded(self._index, number), 0)
            with self._has_work:
                while not (self._over or gathering.has_next or gathering.is_folded):
                    self._has_work.wait()

    def _fold(self, number: int, cell: int, shares: Sequence[float]) -> None:
        if cell in self._tables:
            self._tables[cell].fold(shares)
            return
        vector = self._cells[cell].vector
        start, stop = self._share(cell, self._rank)
        gradients = [
            self._own[vector][start:stop] if member == self._rank else self._inbox[member, cell]
            for member in self.members
        ]
        if self._sent.get(cell) == number:
            self._peers.flush()  # it is written over
        self._sent[cell] = number
        fold_into(self._folds[vector][start:stop], gradients, shares)
        said, fold = owners.Fold(self._index, number, cell), self._bytes_of(self._folds, cell, self._rank)
        for other in self._peers.others if fold else ():
            self._folds_post.put(other, said, fold)

    # --- what is sent ---

    def _share(self, cell: int, owner: int) -> tuple[int, int]:
        where = self._cells[cell]
        return owners.share(where.start, where.stop, self.members.index(owner), len(self.members))

    def _bytes_of(self, vectors: Vectors, cell: int, owner: int) -> memoryview:
        """This owner's share of a cell of them."""
        key = (vectors is self._own, cell, owner)
        if key not in self._bytes:
            start, stop = self._share(cell, owner)
            self._bytes[key] = as_bytes(vectors[self._cells[cell].vector][start:stop])
        return self._bytes[key]


def _cut(buckets: Sequence[Bucket], count: int) -> tuple[list[Cell], list[list[int]]]:
    """The cells for so many owners, and the numbers of those of each bucket."""
    cells: list[Cell] = []
    of: list[list[int]] = []
    for bucket in buckets:
        most = count * SHARE_BYTES // vector_dtype(bucket.vector).itemsize
        cuts = owners.cut(bucket.start, bucket.stop, most)
        of.append(list(range(len(cells), len(cells) + len(cuts))))
        cells += [Cell(bucket.vector, start, stop) for start, stop in cuts]
    return cells, of
