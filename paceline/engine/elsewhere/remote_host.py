"""A worker elsewhere's part in what is folded before it is pushed: in the mirror that the workers of its host share, or
as an owner of a share of what all hosts bring. Making or finding it, and leaving it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from paceline.config import Job
from paceline.engine.elsewhere.around import Around, can_be_owned, has_tables
from paceline.engine.elsewhere.early import buckets
from paceline.engine.elsewhere.host_fold import HostFold
from paceline.engine.elsewhere.line import Line
from paceline.engine.elsewhere.mirror import Broken, HostMirror, Mirror
from paceline.engine.elsewhere.owner_mirror import OwnerHostMirror, OwnerMirror
from paceline.engine.elsewhere.owners import FOLDS, Owners
from paceline.engine.elsewhere.peers import NOT_ONE, Peers
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.engine.elsewhere.remote_gradients import RemoteGradients
from paceline.engine.exchange.replica import Apart
from paceline.errors import HostError
from paceline.protocol import remote
from paceline.transport import segment
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory, size_bytes

_HEAR_S = 45.0
YES, NO = "yes", "no"

logger = logging.getLogger(__name__)


class RemoteHost:
    """Of worker ``rank``. ``ask`` asks the deputy. Who leaves the mirror has its parameters in memory of its own from
    then on, and its gradients travel alone."""

    def __init__(
        self, rank: int, around: Around, gradients: RemoteGradients, line: Line, ask: Callable[[remote.Request], Any]
    ) -> None:
        self._rank, self._around, self._gradients, self._line, self._ask = rank, around, gradients, line, ask
        self._mail = line.mail
        self._peers: Peers | None = None  # where this worker may be an owner
        self._hosts = {lead: around.members(lead) for lead in around.leads}
        self._may_join = False  # may there be owners, of whom it is not settled whether they reach each other?
        self._is_in_crew = False  # may what it brings be folded in shares, by it or by the first of its host?
        self._owning: list[RemoteExchange] = []
        self._told_bytes = 0  # of what it has sent to other owners

    def choose(self, job: Job, told: Any, link: Link, *, is_newcomer: bool) -> str:
        """Where this worker's parameters are to lie; see ``Around.choose``. Owners are linked with each other now,
        those of two hosts when there is something for them."""
        self._link = link
        kind = self._around.choose(job, self._rank, told, is_newcomer=is_newcomer)
        self._may_join = not is_newcomer and self._around.may_own(job, told)
        if not (self._may_join and self._around.are_many):
            return kind
        self._join(kind)
        return kind if self._is_in_crew or kind == remote.HOME else remote.OWN

    def _join(self, kind: str) -> None:
        """Once, on all workers: link the owners."""
        self._may_join = False
        lead, *others = self._around.members(self._rank)
        can = kind != remote.OWN
        if self._rank == lead:
            can = can and all(self._hears(f"member/{other}") for other in others)
            self._peers = self._meet() if can else None
            if self._peers is None:
                self._around.tell(f"peer/{self._rank}", NOT_ONE)
                logger.warning("worker %d does not reach all others: what is brought goes home", self._rank)
            self._is_in_crew = self._peers is not None
            self._around.tell(f"crew/{self._rank}", YES if self._is_in_crew else NO)
        else:
            self._around.tell(f"member/{self._rank}", YES if can else NO)
            self._is_in_crew = can and self._hears(f"crew/{lead}")

    def _hears(self, name: str) -> bool:
        """Does another worker of this host say yes?"""
        try:
            return self._around.ask(name, _HEAR_S) == YES
        except TimeoutError:
            return False

    def _meet(self) -> Peers | None:
        try:
            peers = Peers(self._rank, self._around, self._link)
        except (HostError, LinkEnded):
            return None
        if not peers.meet():
            peers.stop()
            return None
        return peers

    def members(self, one: RemoteExchange, kind: str) -> tuple[list[int], list[int]]:
        """Of its host, with whom it brings what it brings; and of all hosts, where that is folded in shares."""
        here = self._around.members(self._rank) if kind == remote.HOST or one.is_in_crew else []
        return here, list(range(len(self._around.hosts))) if one.is_in_crew else []

    def stop(self) -> None:
        """Nothing is folded any more."""
        for one in self._owning:
            one.disown()
        if self._peers is not None:
            self._peers.stop()

    def lay_out(self, one: RemoteExchange, kind: str) -> str:
        """Make the memory in which the parameters are to lie, where that is not others'; where it is."""
        are_many = self._around.are_many
        can_be = can_be_owned(one.spec) and (are_many or has_tables(one.spec))
        if can_be and self._may_join:
            self._join(kind)
        one.is_in_crew = self._is_in_crew and can_be
        is_folded = one.is_in_crew or not (are_many or has_tables(one.spec))
        if one.is_in_crew and kind == remote.HOST and len(self._around.members(self._rank)) == 1:
            kind = remote.OWNER
        if kind in (remote.HOST, remote.OWNER) and not is_folded:
            kind = remote.OWN
        memory = None
        if kind == remote.HOST and self._rank == self._around.members(self._rank)[0]:
            descriptor, memory = HostMirror.make(one.spec)
            self._around.tell_mirror(self._rank, one.index, descriptor)
        if one.is_in_crew and self._peers is not None:
            self._own(one, kind, self._peers, memory)
        elif memory is not None:
            self._attach(one, memory)
            self._gradients.fold(one)
        one.lay_out(self._mail, kind, self._rank)
        return kind

    def _own(self, one: RemoteExchange, kind: str, peers: Peers, memory: ExchangeMemory | None) -> None:
        """Have a share of what all bring; in this mirror of the host's workers, or one that is made."""
        spec, table, members = one.spec, one.spec.table, self._around.members(self._rank)
        mirror: Mirror | None = None
        if kind != remote.HOME:
            memory = memory or ExchangeMemory(segment.own(size_bytes(spec)), spec)
        folds = Apart.of(table) if memory is None else memory.slots[FOLDS]

        def is_lost() -> bool:
            return self._line.is_ending or not peers.are_all

        owners = Owners(one.index, peers, table, buckets(table), folds, is_lost)
        if memory is not None and len(members) > 1:
            mirror = host = OwnerHostMirror(spec, one.index, self._rank, memory, members, owners)
            host.is_whole = lambda: self._is_whole(one)
        elif memory is not None:
            mirror = OwnerMirror(spec, one.index, self._rank, memory, owners)

        def fold(memory: ExchangeMemory, apart: Apart | None) -> HostFold:
            return HostFold(memory, table, members, self._link, max(memory.stepped) + 1, owners, apart)

        one.own(self._mail, self._rank, owners, mirror, fold if len(members) > 1 else None)
        self._owning.append(one)

    def _attach(self, one: RemoteExchange, memory: ExchangeMemory) -> None:
        one.attach_mirror(self._mail, memory, self._rank, self._around)
        assert one.host is not None
        one.host.is_whole = lambda: self._is_whole(one)

    def _is_whole(self, one: RemoteExchange) -> bool:
        """Asks home: do all of this host still share the mirror?"""
        return bool(self._ask(remote.IsWhole(one.index)))

    def bring(self, one: RemoteExchange, told: remote.Brought) -> None:
        """Home's newest values come to the mirror."""
        if one.is_home or (one.owners is not None and one.host is None):
            self._begin(one, told, is_on=told.comes)
            return
        try:
            if one.host is None:
                place = self._around.find_mirror(self._around.members(self._rank)[0], one.index)
                if place is None:
                    raise Broken
                self._attach(one, HostMirror.open(one.spec, place))
            assert one.host is not None
            one.host.fill(told)
        except (Broken, OSError, HostError):
            self.leave(one)
            return
        self._begin(one, told, is_on=True)

    def _begin(self, one: RemoteExchange, told: remote.Brought, *, is_on: bool) -> None:
        """With these values."""
        one.pull()
        if one.owners is not None:
            one.owners.begin(told.number + 1, is_on=is_on)
        self._gradients.stepped(one)

    def follow(self, one: RemoteExchange, told: remote.Follow) -> bool:
        """Step the round here. False: this worker has had to leave."""
        try:
            one.follow(told)
        except Broken:
            if one.owners is None:
                self.leave(one)
            return False  # an owner is asked about it when the answer has come
        self._gradients.stepped(one)
        return True

    def check(self, one: RemoteExchange, *, is_over: bool) -> None:
        """After a step: does this worker reach all other owners, where that still matters; has its mirror followed?"""
        if one.owners is None:
            return
        assert self._peers is not None
        if one.owners.has_missed or (self._peers.has_lost_one and not is_over):
            self.leave(one)

    def leave(self, one: RemoteExchange) -> None:
        one.disown()
        if not one.is_home:
            one.lay_out(self._mail, remote.OWN, self._rank)
        self._gradients.leave(one)
        self._ask(remote.Leave(one.index))
        if one.is_adopted and not one.is_home:
            one.replica.adopt()

    def heed(self, asked: remote.SendFold | remote.SendOwn, one: RemoteExchange) -> int | None:
        """Send what the deputy asks for; see ``remote.SendFold``."""
        if isinstance(asked, remote.SendOwn):
            self._gradients.send_own(one)
            return None
        count = len(self._around.hosts) if one.owners is not None else len(one.host.members) if one.host else 0
        if not count or len(asked.weights) != count or not 0 < sum(asked.weights) < math.inf:
            raise HostError(f"home asks for a fold of {count} workers with weights {asked.weights}")
        if one.owners is None:
            self._gradients.send_fold(asked, one)
        elif self._finish(one, one.owners, asked):
            if one.is_home:
                one.owners.lay_folds(one.replica.slot)
            return self._count_bytes()
        return None

    def _finish(self, one: RemoteExchange, owners: Owners, asked: remote.SendFold) -> bool:
        """Have the folds of all, with the weights of all."""
        if one.fold is not None:
            one.fold.finish(asked.number, {member: asked.weights[member] for member in self._hosts[self._rank]})
            owners.give(())
        return owners.finish(
            asked.number, [sum(asked.weights[m] for m in self._hosts[lead]) for lead in owners.members]
        )

    def _count_bytes(self) -> int:
        assert self._peers is not None
        told, self._told_bytes = self._told_bytes, self._peers.sent_bytes
        return self._told_bytes - told
