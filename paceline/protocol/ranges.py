"""Servers on hosts of their own: what each steps, and what it tells home and the workers (docs/decisions/0025).

    worker --gradients of its range--> server elsewhere --Newest, parameters--> worker
    home:  its deputy  --Step, Apply--> server elsewhere --Stepped, Applied--> its deputy: the same words as any server

Server ``m`` is on host ``m % hosts`` of those that have servers; the first of them is home's. What it steps is a share,
or some parts, as with any server. Values are with it alone; words are at home.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import msgspec

from paceline.protocol.link import Number
from paceline.protocol.messages import Failed
from paceline.protocol.mirrors import Follow, Said
from paceline.protocol.remote import Piece, Stop

SHARE = 0  # in place of a part, where a round is stepped and not an entry of the log
WHOLE = -1  # in place of a part: all that the server has

_Part = Annotated[int, msgspec.Meta(ge=WHOLE, lt=2**62)]
_Host = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,255}\Z")]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


def is_elsewhere(server: int, hosts: int) -> bool:
    """Is this server on another host than home's, of so many that have servers?"""
    return server % hosts != 0


def elsewhere(servers: int, hosts: int) -> list[int]:
    """Which of so many servers are."""
    return [server for server in range(servers) if is_elsewhere(server, hosts)]


def at_home(servers: int, hosts: int) -> list[int]:
    """Which of so many servers are not."""
    return [server for server in range(servers) if not is_elsewhere(server, hosts)]


def parts_of(server: int, servers: int, parts: int) -> list[int]:
    """The parts that this one of so many servers has; [SHARE] where there are none, and a round is divided."""
    return list(range(server, parts, servers)) if parts else [SHARE]


def fetch_word(before: int, *, parameters: bool, state: bool) -> int:
    """What is asked for next, after ``before``: a number that rises, with what of it home is to have."""
    return (before // 4 + 1) * 4 + 2 * parameters + state


def fetches(word: int) -> tuple[bool, bool]:
    """Is it parameters, is it the optimizer's state?"""
    return bool(word & 2), bool(word & 1)


# Home tells the server; what belongs to it has come before.


class Attach(Said, frozen=True, tag=80):
    """...there is an exchange with this spec."""

    exchange: Number
    spec: bytes


class Fill(Said, frozen=True, tag=81):
    """...the values of your range, and the optimizer's state of it, have come; ``loads``: checkpoints loaded by now."""

    exchange: Number
    loads: Number


class Step(Said, frozen=True, tag=82):
    """...this round is closed: step your share of it; all gradients have come. Answer: Stepped."""

    exchange: Number
    follow: Follow


class Apply(Said, frozen=True, tag=83):
    """...this entry of the log is next at your ``part``. ``members``: (worker, number of its push, weight, mask) of a
    STEP; ``workers``: who gets a copy. ``settings``: of the first member, if they have changed. Answer: Applied."""

    exchange: Number
    part: _Part
    number: Number
    staleness: Number
    members: Sequence[tuple[Number, Number, float, bytes]]
    workers: Sequence[Number]
    settings: bytes


class Fetch(Said, frozen=True, tag=84):
    """...home wants what you have (``fetches``); nobody steps now. Answer: Fetched."""

    exchange: Number
    number: Number


# The server tells home.


class Here(Said, frozen=True, tag=90):
    """...this is where workers come to."""

    host: _Host
    port: _Port


class Stepped(Said, frozen=True, tag=91):
    """...the round is; its contributors have been sent what is new."""

    exchange: Number
    number: Number


class Applied(Said, frozen=True, tag=92):
    """...the entry is, to this part; who is to have a copy has been sent it."""

    exchange: Number
    part: _Part
    number: Number


class Fetched(Said, frozen=True, tag=93):
    """...what was asked for has come."""

    exchange: Number
    number: Number


class Failing(Said, frozen=True, tag=94):
    """...I cannot go on."""

    failure: Failed


class Terminated(Said, frozen=True, tag=97):
    """...whoever has started my process wants it to end: let all end behind one step, and save."""


# A worker and a server.


class Want(Said, frozen=True, tag=95):
    """The worker: send me what you have, once so many checkpoints are loaded. Answer: Newest of the WHOLE."""

    exchange: Number
    number: Number
    loads: Number


class Newest(Said, frozen=True, tag=96):
    """The server: of ``part``, all that you have not has come, as of round, entry or Want ``number``. ``tables``: the
    parameters with sparse rows of which some have."""

    exchange: Number
    part: _Part
    number: Number
    tables: Sequence[Number]


# Who hears what, and nothing else.

FromHome: TypeAlias = Piece | Stop | Attach | Fill | Step | Apply | Fetch
ToHome: TypeAlias = Piece | Here | Stepped | Applied | Fetched | Failing | Terminated
FromWorker: TypeAlias = Piece | Want
ToWorker: TypeAlias = Piece | Newest
Any_: TypeAlias = FromHome | ToHome | FromWorker | ToWorker
