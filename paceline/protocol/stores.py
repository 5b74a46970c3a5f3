"""What a worker elsewhere asks its deputy (``remote.py``) of a store: named tensors that are used directly."""

from __future__ import annotations

from paceline.protocol.link import Number
from paceline.protocol.mirrors import Said

STORE = "store"  # where the parameters of an optimizer lie that is a store's: at home; they are asked for one by one


class PushStore(Said, frozen=True, tag=70):
    """...push what has come before for the tensors in ``pushed``, which tells of how many dimensions its sparse
    indices are, 0 of a dense one. ``settings`` as in Step. Nothing."""

    store: Number
    pushed: dict[Number, Number]
    settings: bytes


class PullStore(Said, frozen=True, tag=71):
    """...what is the newest value of this tensor? Nothing; it has come before."""

    store: Number
    tensor: Number


class AwaitStore(Said, frozen=True, tag=72):
    """...is my last push applied? Nothing, when it is."""

    store: Number
