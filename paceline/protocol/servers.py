"""The coordinator's decisions about servers: who steps, who is to come, who is to leave (docs/decisions/0019). Pure."""

from __future__ import annotations

from paceline.protocol.crew import crew_word
from paceline.protocol.effects import Effect, Open, Replace, Serve, Tell


class Servers:
    """Who serves: ``count`` at the start. A server is in the crew from when it is there to when it is to leave; one
    that dies is replaced, up to ``restarts`` times without any worker's getting on."""

    def __init__(self, count: int, restarts: int) -> None:
        self.wanted = self._crew = self._kept = count
        self._crews = 0  # that there have been before
        self.deaths: dict[int, int] = {}  # since any worker last got on
        self._restarts = restarts
        self._here = set(range(count))  # ranks that have a process, or another is to have in its place
        self._coming: dict[int, int] = {}  # who was added, and is not there yet -> how many have died of it
        self._leaving: set[int] = set()

    def scale(self, count: int) -> list[Effect]:
        """To be asked only where there is no ``refusal``. Highest places leave first: server 0 stays."""
        self.wanted = count
        self._leaving |= {rank for rank in self._here if rank >= count}
        return self._opened()

    def joined(self, rank: int) -> list[Effect]:
        """It is there; this may be said by every process of it."""
        if self._coming.pop(rank, None) is None:
            return []
        text = f"server {rank} steps its part of the parameters from now on"
        told = [] if rank in self._leaving else [Tell("join", text, "server", rank)]
        return [*told, *self._settle()]

    def died(self, rank: int, status: int, what: str, *, may_replace: bool) -> list[Effect]:
        """Nothing if it cannot be replaced, and others cannot go on without it. One that was to leave has left if it
        ended by itself: it knows that nothing is left for it to do."""
        if rank in self._leaving and status == 0:
            return self._left(rank)
        if not may_replace:
            return []
        if rank in self._coming:
            self._coming[rank] += 1
            if self._coming[rank] > self._restarts:
                self.wanted = min(self.wanted, rank)
                self._leaving |= {other for other in self._here if other >= rank}
                return [Tell("died", f"{what}; the others go on without it", "server", rank), *self._left(rank)]
        else:
            self.deaths[rank] = self.deaths.get(rank, 0) + 1
            if self.deaths[rank] > self._restarts:
                return []
        return [Tell("died", f"{what}; another takes its place", "server", rank), Replace(rank, "server")]

    def _left(self, rank: int) -> list[Effect]:
        self._here.discard(rank)
        self._leaving.discard(rank)
        self._coming.pop(rank, None)
        number = len(self._here)
        text = f"server {rank} has left; {number} {'goes' if number == 1 else 'go'} on"
        return [Tell("leave", text, "server", rank), *self._opened()]

    def _opened(self) -> list[Effect]:
        """Places are kept before anybody comes to one, and sees that it is to leave."""
        missing = self._open_missing()
        return [*self._settle(), *missing]

    def _open_missing(self) -> list[Effect]:
        """But for those above one that leaves, who would leave with it."""
        missing = [rank for rank in range(self._kept_now) if rank not in self._here]
        self._here |= set(missing)
        self._coming |= dict.fromkeys(missing, 0)
        return [Open(rank, "server") for rank in missing]

    @property
    def _kept_now(self) -> int:
        return min([self.wanted, *self._leaving])

    def _settle(self) -> list[Effect]:
        """Who has been told to leave does, also if it is wished for again."""
        away = self._coming.keys() | self._leaving
        crew = next((rank for rank in range(self.wanted) if rank in away), self.wanted)
        kept = self._kept_now
        if (crew, kept) == (self._crew, self._kept):
            return []
        self._crews += crew != self._crew
        self._crew, self._kept = crew, kept
        return [Serve(crew_word(self._crews, crew), kept)]
