"""What a worker elsewhere knows of the others: on which hosts they are, and what those of its own host tell it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from paceline.config import Job, Sync
from paceline.engine.elsewhere.mirror import arithmetic
from paceline.params.fold import WIDE
from paceline.params.table import vector_dtype
from paceline.protocol import remote
from paceline.transport.borrow import can_borrow, this_host
from paceline.transport.slots import Spec

_LOOK_S = 0.01


class Notes(Protocol):
    """What all processes of a run can read: torch's store."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Around:
    """``hosts``: on which each worker is, by rank; none: nothing is known of others, and all are taken to be here."""

    hosts: Sequence[str] = ()
    notes: Notes | None = None

    def host(self, rank: int) -> str:
        return self.hosts[rank] if self.hosts else this_host()

    @property
    def are_apart(self) -> bool:
        """Are there several hosts?"""
        return len(set(self.hosts)) > 1

    @property
    def are_many(self) -> bool:
        """Are there more than two?"""
        return len(set(self.hosts)) > 2

    def members(self, rank: int) -> list[int]:
        """Who is on this worker's host, lowest rank first."""
        return [other for other, host in enumerate(self.hosts) if host == self.hosts[rank]]

    @property
    def leads(self) -> list[int]:
        """The first worker of each host."""
        return [rank for rank, host in enumerate(self.hosts) if self.hosts.index(host) == rank]

    def choose(self, job: Job, rank: int, told: Any, *, is_newcomer: bool) -> str:
        """Where this worker's parameters are to lie. ``told``: the answer to ``remote.Who``."""
        # A newcomer's gradients of ghost batches are nobody's business, so its memory is its own.
        if not isinstance(job.pace, Sync) or job.servers or is_newcomer:
            return remote.OWN
        home = told["try"]  # a descriptor of one of home's processes, if it is on this host
        if home is not None and can_borrow(*home):
            return remote.HOME
        if not self.are_apart or told["arithmetic"] != arithmetic():
            return remote.OWN
        if job.workers == 2:
            return remote.MIRROR
        if self.are_many and self.may_own(job, told):
            return remote.HOST if len(self.members(rank)) > 1 else remote.OWNER
        here, others = self.hosts[rank], set(self.hosts) - {self.hosts[rank]}
        is_one_of_two = others == {told["host"]} and here != told["host"] and len(self.hosts) == job.workers
        return remote.HOST if is_one_of_two and self.notes is not None else remote.OWN

    def may_own(self, job: Job, told: Any) -> bool:
        """May each of three hosts or more fold a share of all gradients (owners.py), or each of two the rows of tables?
        All say the same."""
        are_known = len(self.hosts) == job.workers > 2 and self.are_apart and self.hosts[0] == told["host"]
        return are_known and isinstance(job.pace, Sync) and not job.servers and self.notes is not None

    def tell(self, name: str, value: str) -> None:
        """To all others."""
        assert self.notes is not None
        self.notes.set(name, value)

    def ask(self, name: str, timeout_s: float) -> str:
        """What one of them has told, or tells within so long. Raises TimeoutError."""
        assert self.notes is not None
        until_s = time.monotonic() + timeout_s
        while not self.notes.check([name]):
            if time.monotonic() > until_s:
                raise TimeoutError(f"nobody has told {name}")
            time.sleep(_LOOK_S)
        return self.notes.get(name).decode()

    def tell_mirror(self, rank: int, index: int, descriptor: int) -> None:
        """Let the others of this host find the mirror of exchange ``index``, which this process has made."""
        assert self.notes is not None
        self.notes.set(f"mirror/{rank}/{index}", f"{os.getpid()} {descriptor}")

    def find_mirror(self, lead: int, index: int) -> tuple[int, int] | None:
        """The process and descriptor that worker ``lead`` has told, if it has."""
        name = f"mirror/{lead}/{index}"
        if self.notes is None or not self.notes.check([name]):
            return None
        pid, descriptor = self.notes.get(name).split()
        return int(pid), int(descriptor)


def has_tables(spec: Spec) -> bool:
    """Are any of the gradients sparse rows?"""
    return any(entry.row for entry in spec.table.entries)


def can_be_owned(spec: Spec) -> bool:
    """Can each of several hosts fold a share of them, and rows for itself? Those of 32 or 64 bits."""
    return not any(vector_dtype(vector) in WIDE for vector in spec.table.sizes)
