"""What follows from a death that the launcher has told of: drawn once for all, under the run's lock.

Decision 9: the abandoned round is stepped, what the dead have pushed counts and with it the samples behind it, their
other batches are there for others, and their places are away. Who leaves on its own accord says so here too. Where
batches are dealt by number, what is left of the part of one that is given up is dealt anew (docs/decisions/0020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.leases import Leases
from paceline.engine.worker.position import done_in, key_of, loader_of
from paceline.protocol.deals import ALL, deal_over, is_at_tail
from paceline.protocol.rounds import AWAY, LEFT, NOT_PARKED, PRESENT, Waiting, is_drained, place_of


class Settling:
    """All of it is called under the run's lock; ``leases`` by loader."""

    def __init__(
        self,
        context: Context,
        exchanges: Sequence[Exchange],
        stores: Sequence[Exchange],
        leases: Mapping[int, Leases],
        *,
        in_rounds: bool,
    ) -> None:
        self._board, self._exchanges, self._stores, self._leases = context.board, exchanges, stores, leases
        self._in_rounds = in_rounds

    def bury(self) -> list[int]:
        """Let those who have died count in no exchange; who of them is not settled yet."""
        board = self._board
        dead = [w for w in range(board.width) if board.settled[w] < board.deaths[w]]
        for worker in dead:
            for exchange in (*self._exchanges, *self._stores):
                exchange.bury(worker, board.deaths[worker])
        return dead

    def settle(self) -> bool:
        """Draw all consequences that can be drawn now; has anything changed?"""
        board = self._board
        dead = self.bury()
        for exchange in (*self._exchanges, *self._stores) if dead or board.owes else ():
            exchange.finish_abandoned()
        # To give back the batches of one whose round is not over would free others to push it, who are not in it; and a
        # checkpoint of the round before must not count what it has pushed.
        owed = [worker for worker in dead if self._is_in_round(worker)]
        dead = [worker for worker in dead if worker not in owed]
        for worker in dead:
            board.ring(worker)  # the dead do not
            for exchange in self._exchanges if self._in_rounds else ():
                self.settle_place(worker, exchange.place(worker))
            for leases in self._leases.values():
                leases.bury(worker)
            board.parked[worker] = NOT_PARKED
            board.answers[worker] = board.asks[worker] + (board.asks[worker] & 1)
            board.settled[worker] = board.deaths[worker]
            if board.gone[worker] != LEFT:
                board.presence[worker] = AWAY
        lost = self._let_go([w for w in range(board.width) if board.given_up[w] and board.gone[w] == AWAY])
        board.owes = bool(owed) or any(board.given_up[w] and board.gone[w] == AWAY for w in range(board.width))
        for loader in self._leases if dead else ():
            self.drain(loader)
        return bool(dead or lost)

    def _let_go(self, given_up: Sequence[int]) -> bool:
        """Nobody waits any more for these to finish their pass, unless somebody is in a round: that may be closed
        without those who wait, and they would come to it."""
        board = self._board
        for worker in given_up:
            board.presence[worker] = PRESENT  # as if it had just died: from here on no round is closed
        lost = all(exchange.is_between_rounds() is True for exchange in self._exchanges) if given_up else False
        for worker in given_up if lost else ():
            self._lose(worker)
        if lost:
            self._decide(given_up)
        for worker in given_up:
            board.presence[worker] = LEFT if lost else AWAY
            board.ring(worker)
        return lost

    def _is_in_round(self, worker: int) -> bool:
        """Was this worker, which has died, in a round that is not over?"""
        return any(exchange.is_in_round(worker) for exchange in self._exchanges)

    def settle_place(self, worker: int, place: tuple[int, int]) -> None:
        """A push of the worker's counts, and with it the samples that it had come to by then."""
        key, position = place
        if not key:
            return
        loader = loader_of(key)
        if not self._board.trained[loader]:
            self._board.trained[loader] = 1  # it may have died before it said so
        leases = self._leases.get(loader)
        if leases is not None:
            leases.settle(worker, position)
            return
        places = self._board.places
        if places[2 * worker] != key:
            places[2 * worker], places[2 * worker + 1] = key, 0
        places[2 * worker + 1] = max(places[2 * worker + 1], position)

    def settle_places(self, number: int) -> None:
        """So do all pushes up to this round, which is over."""
        for worker in range(self._board.width) if self._in_rounds else ():
            self.settle_place(worker, self._exchanges[0].place_in(worker, number))

    def forgo(self, worker: int, *, begun: bool = False) -> None:
        """Nobody waits any more for this worker, whose process this is. What it had drawn is there for others, and with
        ``begun`` what does not count of what it has begun."""
        for leases in self._leases.values() if begun else ():
            leases.bury(worker)
        self.settle()
        for leases in self._leases.values():
            leases.forgo()
        self._decide([worker])
        self._board.presence[worker] = LEFT

    def _decide(self, leaving: Sequence[int]) -> None:
        """What these hold up at tails. Before they are LEFT: rounds wait for them until then, and would be closed
        without who stands at a tail and is free to go on, if that were decided afterwards."""
        board = self._board
        for loader in self._leases:
            self.drain(loader, leaving=leaving)
        for loader, number in board.shares.passes():
            self.end_deal(loader, number + 1, board.deals[place_of(loader, number)], leaving=leaving)

    def drain(self, loader: int, arriving: int | None = None, leaving: Sequence[int] = ()) -> None:
        """After any change that may drain a pass over ``loader``, or before these leave."""
        board = self._board
        before = board.drained[loader]
        while is_drained(loader, board.drained[loader] + 1, arriving, board, leaving):
            board.drained[loader] += 1
        if board.drained[loader] > before:
            board.ring(board.common)

    # --- where batches are dealt by number ---

    def _lose(self, worker: int) -> None:
        """Of what is dealt to this worker, which is given up, that counts which it has trained on."""
        board = self._board
        for loader, number in board.shares.passes():
            dealt = board.shares.dealt(loader, number)
            if dealt is not None and dealt.is_in(worker) and board.passes(loader)[worker] <= number:
                done = done_in(board.places, worker, key_of(loader, number, dealt.newest))
                board.shares.take_out(loader, number, worker, done)
                board.shares.lose(loader, number)

    def end_deal(
        self, loader: int, number: int, deal: int, arriving: int | None = None, leaving: Sequence[int] = ()
    ) -> bool | Waiting:
        """Is there another deal of pass ``number``, behind this one, or is the pass drained (False)? ``arriving`` is a
        worker that has come to its tail, and is not parked there; these are ``leaving``."""
        board = self._board
        if board.drained[loader] >= number:
            return False
        if board.deals[place_of(loader, number - 1)] > deal:
            return True
        over = deal_over(loader, number, arriving, board, leaving)
        if isinstance(over, Waiting):
            return over
        dealt = board.shares.dealt(loader, number - 1)
        share = [w for w in dealt.sharers if dealt.is_in(w)] if over and dealt is not None else []
        stand = [w for w in share if w == arriving or is_at_tail(w, loader, number, board)]
        if stand:
            for worker in set(share) - set(stand):
                board.shares.take_out(loader, number - 1, worker, ALL)  # it has finished the pass
            board.shares.deal_anew(loader, number - 1)
        else:
            board.drained[loader] = number
        board.ring(board.common)
        return bool(stand)
