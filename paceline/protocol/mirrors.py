"""What a worker and its deputy (``remote.py``) say of where parameters lie, and of mirrors (docs/decisions/0017)."""

from __future__ import annotations

import msgspec

from paceline.protocol.link import Number


class Said(msgspec.Struct, frozen=True, tag_field="t", array_like=True):
    """Base of all that is said over the link: a msgpack array that begins with the tag."""


# Where the parameters of a worker elsewhere lie: in memory of its own, in home's, which is on the same host, or in a
# mirror of home's, which is stepped there as home steps, with what others have pushed: one's own, or one that is shared
# with the other workers of a host, whose gradients are folded before they are sent; or one that is stepped with what
# the workers of all hosts have folded, each a share (owners.py).
OWN, HOME, MIRROR, HOST, OWNER = "own", "home", "mirror", "host", "owner"


# Asked by the worker.


class Leave(Said, frozen=True, tag=52):
    """...from now on my parameters lie in memory of my own. Nothing, and the newest values have come before."""

    exchange: Number


class IsWhole(Said, frozen=True, tag=53):
    """...I wait for others of my host. Do all of them live, and share its mirror?"""

    exchange: Number


# Asked by the deputy, while the worker waits for an answer to a step, or a norm, for which it has offered its gradient.


class SendFold(Said, frozen=True, tag=65):
    """...send what your host's workers bring to this round, folded; all have offered it. ``weights``: by member, lowest
    first. Answer: Shown, without anything.

    An owner folds its share, and answers when it has what all have folded, with how many bytes it has sent to others
    since it was asked last; or, without anything, that this will not be."""

    exchange: Number
    number: Number
    weights: list[float]


class SendOwn(Said, frozen=True, tag=66):
    """...send your own gradient: it will be in no fold. Answer: Shown, without anything."""

    exchange: Number


# Told with an answer, by exchange; or before it.


class Follow(msgspec.Struct, frozen=True, array_like=True):
    """Round ``number`` is over. It was stepped with what these workers had pushed, with these weights and factors, for
    the parameters in these masks; what had not come before has come now. ``settings``: of the first of them, if they
    have changed. ``loads``: checkpoints that have been loaded by then."""

    number: Number
    loads: Number
    sources: list[tuple[Number, float, float, bytes]]
    settings: bytes


def mistaken(told: Follow, workers: int, parameters: int, settings_bytes: int) -> str | None:
    """Why a mirror of so many workers and parameters, with so much room for settings, cannot step this; or None."""
    ranks = [source[0] for source in told.sources]
    if not ranks or len(set(ranks)) < len(ranks) or max(ranks) >= workers:
        return f"what workers {ranks} of {workers} have pushed"
    for rank, _, _, mask in told.sources:
        if mask and len(mask) != parameters:
            return f"worker {rank} has pushed {len(mask)} gradients for {parameters} parameters"
    if len(told.settings) > settings_bytes:
        return f"settings of {len(told.settings)} bytes in room for {settings_bytes}"
    return None


class Close(Said, frozen=True, tag=67):
    """...the round that you have asked a step for is closed: step it now, as home does. Answer: Took."""

    exchange: Number
    follow: Follow


class Brought(msgspec.Struct, frozen=True, array_like=True):
    """A host's mirror is to have home's values after round ``number``, when ``loads`` checkpoints had been loaded. They
    have come before this (``comes``), or to another of its workers. To an owner the parameters have come in any case,
    where it has not home's, but the optimizer's state only if it ``comes``; only then is the next round folded."""

    number: Number
    loads: Number
    comes: bool


class Took(Said, frozen=True, tag=5):
    """...my mirror has stepped this round: what others push in the next may come. No answer."""

    exchange: Number
    number: Number
