"""A worker elsewhere's part in what is folded before it is pushed: in the mirror that the workers of its host share, or
as an owner of a share of what all hosts bring. Making or finding it, and leaving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from paceline.config import Job
from paceline.engine.elsewhere.around import Around, can_be_folded, can_be_owned
from paceline.engine.elsewhere.line import Line
from paceline.engine.elsewhere.mirror import Broken, HostMirror
from paceline.engine.elsewhere.peers import NOT_ONE, Peers
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.engine.elsewhere.remote_gradients import RemoteGradients
from paceline.errors import HostError
from paceline.protocol import remote
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link

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
        self._owning: list[RemoteExchange] = []
        self._told_bytes = 0  # of what it has sent to other owners

    def choose(self, job: Job, told: Any, link: Link, *, is_newcomer: bool) -> str:
        """Where this worker's parameters are to lie; see ``Around.choose``. Owners are linked with each other now."""
        kind = self._around.choose(job, self._rank, told, is_newcomer=is_newcomer)
        if is_newcomer or not self._around.may_own(job, told):
            return kind
        if kind != (remote.OWNER if self._rank else remote.HOME):
            self._around.tell(f"peer/{self._rank}", NOT_ONE)
            return kind
        try:
            peers = Peers(self._rank, self._around, link)
        except (HostError, LinkEnded):
            self._around.tell(f"peer/{self._rank}", NOT_ONE)
        else:
            if peers.meet():
                self._peers = peers
            else:
                peers.stop()
                logger.warning("worker %d does not reach all others: what is brought goes home", self._rank)
        return kind if self._peers is not None or kind == remote.HOME else remote.OWN

    def members(self, one: RemoteExchange, kind: str) -> list[int]:
        """With whom this worker brings what it brings, itself among them."""
        if kind == remote.HOST:
            return self._around.members(self._rank)
        return [] if one.owners is None else list(one.owners.members)

    def stop(self) -> None:
        """Nothing is folded any more."""
        for one in self._owning:
            one.disown()
        if self._peers is not None:
            self._peers.stop()

    def lay_out(self, one: RemoteExchange, kind: str) -> str:
        """Make the memory in which the parameters are to lie, where that is not others'; where it is."""
        is_owner = self._peers is not None and can_be_owned(one.spec)
        if (kind == remote.HOST and not can_be_folded(one.spec)) or (kind == remote.OWNER and not is_owner):
            kind = remote.OWN
        peers = self._peers
        if peers is not None and is_owner:
            one.own(self._mail, kind, self._rank, peers, lambda: self._line.is_ending or not peers.are_all)
            self._owning.append(one)
        if kind == remote.HOST and self._rank == self._around.members(self._rank)[0]:
            descriptor = HostMirror.make(one.spec)
            self._around.tell_mirror(self._rank, one.index, descriptor)
            self._attach(one, (os.getpid(), descriptor))
            self._gradients.fold(one)
        one.lay_out(self._mail, kind, self._rank)
        return kind

    def _attach(self, one: RemoteExchange, place: tuple[int, int]) -> None:
        memory = HostMirror.open(one.spec, place)
        one.attach_mirror(self._mail, memory, self._rank, self._around)
        assert one.host is not None
        one.host.is_whole = lambda: bool(self._ask(remote.IsWhole(one.index)))

    def bring(self, one: RemoteExchange, told: remote.Brought) -> None:
        """Home's newest values come to the mirror."""
        if one.owners is not None:
            if one.mirror is not None:
                one.memory.loads[0] = told.loads
                one.replica.pull()
            one.owners.begin(told.number + 1, is_on=told.comes)
            return
        try:
            if one.host is None:
                place = self._around.find_mirror(self._around.members(self._rank)[0], one.index)
                if place is None:
                    raise Broken
                self._attach(one, place)
            assert one.host is not None
            one.host.fill(told)
        except (Broken, OSError, HostError):
            self.leave(one)
            return
        one.replica.pull()
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
        elif one.owners is None:
            self._gradients.send_fold(asked, one)
        elif one.owners.finish(asked.number, asked.weights):
            if one.is_home:
                one.owners.lay_folds(one.replica.slot.gradient)
            return self._count_bytes()
        return None

    def _count_bytes(self) -> int:
        assert self._peers is not None
        told, self._told_bytes = self._told_bytes, self._peers.sent_bytes
        return self._told_bytes - told
