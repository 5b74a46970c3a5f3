"""A worker elsewhere's part in the mirror that the workers of its host share: making or finding it, and leaving it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from paceline.engine.elsewhere.around import Around, can_be_folded
from paceline.engine.elsewhere.mail import Mail
from paceline.engine.elsewhere.mirror import Broken, HostMirror
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.engine.elsewhere.remote_gradients import RemoteGradients
from paceline.errors import HostError
from paceline.protocol import remote


class RemoteHost:
    """Of worker ``rank``. ``ask`` asks the deputy. Who leaves the mirror has its parameters in memory of its own from
    then on, and its gradients travel alone."""

    def __init__(
        self, rank: int, around: Around, gradients: RemoteGradients, mail: Mail, ask: Callable[[remote.Request], Any]
    ) -> None:
        self._rank, self._around, self._gradients, self._mail, self._ask = rank, around, gradients, mail, ask

    def lay_out(self, one: RemoteExchange, kind: str) -> str:
        """Make the memory in which the parameters are to lie, where that is not others'; where it is."""
        if kind == remote.HOST and not can_be_folded(one.spec):
            kind = remote.OWN
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
            self.leave(one)
            return False
        self._gradients.stepped(one)
        return True

    def leave(self, one: RemoteExchange) -> None:
        one.lay_out(self._mail, remote.OWN, self._rank)
        self._gradients.leave(one)
        self._ask(remote.Leave(one.index))
        if one.is_adopted:
            one.replica.adopt()

    def heed(self, asked: remote.SendFold | remote.SendOwn, one: RemoteExchange) -> None:
        """Send what the deputy asks for."""
        if isinstance(asked, remote.SendFold):
            self._gradients.send_fold(asked, one)
        else:
            self._gradients.send_own(one)
