"""What a worker on another host and its deputy at home tell each other: one struct a message, no number reused.

The worker asks, the deputy does it as the worker that it is on its host, and answers: one at a time. What needs no
answer is a *note*, and travels with the next that is asked. Arrays come before what they belong to, in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from paceline.protocol.deals import Deal
from paceline.protocol.link import Number
from paceline.protocol.messages import Failed
from paceline.protocol.mirrors import (
    HOME,
    HOST,
    MIRROR,
    OWN,
    OWNER,
    Brought,
    Close,
    Follow,
    IsWhole,
    Leave,
    Said,
    SendFold,
    SendOwn,
    Took,
)
from paceline.protocol.stores import STORE, AwaitStore, PullStore, PushStore

__all__ = [
    "HOME",
    "HOST",
    "MIRROR",
    "OWN",
    "OWNER",
    "STORE",
    "AwaitStore",
    "Brought",
    "Close",
    "Follow",
    "IsWhole",
    "Leave",
    "PullStore",
    "PushStore",
    "SendFold",
    "SendOwn",
    "Took",
]


class Piece(Said, frozen=True, tag=1):
    """...these bytes (the payload) belong at ``start`` of what is called ``what``, of ``total`` bytes."""

    what: str
    start: Number
    total: Number


class Enclosed(msgspec.Struct, frozen=True, array_like=True):
    """As a Piece with its bytes, in a message's own body: a frame less, and a thread less that is woken for it."""

    what: str
    start: Number
    total: Number
    data: bytes


class Letter(Said, frozen=True, tag=73):
    """...these are small. In their order, and before what comes later."""

    enclosed: list[Enclosed]


# Notes: what the script did. The deputy does it in their order.


class Fetched(Said, frozen=True, tag=10):
    """...the next of my batches of this loader is there."""

    loader: Number


class Drawn(Said, frozen=True, tag=11):
    """...a batch of so many samples goes to the script."""

    loader: Number
    samples: Number


class Border(Said, frozen=True, tag=12):
    """...the script has done with a batch. As a request, where Status ``saves``; then the answer is nothing."""


class Left(Said, frozen=True, tag=13):
    """...the script has left a pass early; ``marks`` as in Begin."""

    loader: Number
    marks: int


class Told(Said, frozen=True, tag=14):
    """...the script has logged this."""

    loss: float | None
    values: dict[str, float]


class LocalStep(Said, frozen=True, tag=15):
    """...a step of my own within a period. ``bad``: the parameter whose gradient was not finite. ``brings``: what the
    period has come to since it was brought last has come before this, for the parameters in ``mask``."""

    exchange: Number
    void: bool
    bad: Number | None = None
    brings: bool = False
    mask: bytes = b""


class Dropped(Said, frozen=True, tag=16):
    """...the script has dropped the gradients of an exchange; ``in_hand``: with that of the batch in hand."""

    exchange: Number
    in_hand: bool


Note = Fetched | Drawn | Border | Left | Told | LocalStep | Dropped


# What is asked. Each docstring tells what the answer's value is.


class Who(Said, frozen=True, tag=30):
    """...who am I to be? I am this process on this host. The job's fields, the run's directory at home, what
    arithmetic home does (processor and torch), if home is on the same host a process and a descriptor of it to try, and
    does the run go on from a checkpoint, and then what had been trained on, by loader."""

    host: str
    pid: Number


class Parameter(msgspec.Struct, frozen=True, array_like=True):
    """One parameter of an optimizer; ``rows``: its gradients are sparse rows."""

    name: str
    shape: tuple[Number, ...]
    stride: tuple[Number, ...]
    dtype: str
    group: Number
    rows: bool


class WrapOptimizer(Said, frozen=True, tag=31):
    """...share this optimizer. ``spec`` is what I take its exchange to be; ``state`` is a document (params/packing.py)
    without its tensors; ``memory`` is where my parameters are to lie. For a STORE it is of an optimizer that steps what
    is pushed, and the answer is the store's number.

    Answer: the process and descriptor of home's memory, to map it (HOME), or nothing, and the newest values have come
    before; for a MIRROR with the optimizer's state. ``members``: who is on this host, where what they bring is folded.
    ``crew``: whose is folded in shares by all hosts: all workers or none.
    """

    optimizer: str
    settings: bytes
    parameters: list[Parameter]
    state: Any
    spec: bytes
    memory: str = OWN
    members: Sequence[Number] = ()
    crew: Sequence[Number] = ()


class CopyFirst(Said, frozen=True, tag=32):
    """...set these tensors to worker 0's. Nothing; the values have come before."""

    table: bytes


class WrapBuffers(Said, frozen=True, tag=33):
    """...average these at the end of every pass. Nothing."""

    table: bytes


class WrapLoader(Said, frozen=True, tag=34):
    """...this is a loader, of data with this fingerprint. Its number."""

    fingerprint: int


class Barrier(Said, frozen=True, tag=35):
    """...I am here. Nothing, when all are."""


class Begin(Said, frozen=True, tag=36):
    """...a pass begins; ``is_training``: the models are in training mode. ``marks`` is another number whenever a
    backward pass has added to a gradient. (Is it a real one? how many batches to skip; are there leases?)"""

    loader: Number
    length: Number | None
    is_training: bool
    marks: int


class DrawLease(Said, frozen=True, tag=37):
    """...draw me a batch; ``begins``: it goes to the script next, so begin it too. Its ordinal, or None."""

    loader: Number
    total: Number | None
    at_least: Number
    begins: bool


class DropLease(Said, frozen=True, tag=38):
    """...what I have drawn lies behind the stream's end. Nothing."""

    loader: Number


class BeginLease(Said, frozen=True, tag=39):
    """...my oldest batch goes to the script. Is it still mine?"""

    loader: Number


class More(Said, frozen=True, tag=40):
    """...none is left for me to draw, or of my part. Have others given some back, or is there another deal?"""

    loader: Number


class End(Said, frozen=True, tag=41):
    """...the script has come to the pass's end. Nothing, when all have."""

    loader: Number
    is_training: bool
    marks: int


class Step(Said, frozen=True, tag=42):
    """...step; the gradients of the parameters in ``mask`` have come before. ``rows``: which of them are sparse rows,
    and how many; negative where they are not unique. ``settings``: the hyper-parameters, if they have changed.
    ``offers``: the gradients, which are finite, are in my host's mirror, and are sent when they are asked for.
    ``factor``: they are those of which I asked a norm, times this, which is above 0. ``finite``: I have looked, all
    values are. Nothing."""

    exchange: Number
    void: bool
    mask: bytes
    rows: dict[Number, int]
    settings: bytes
    offers: bool = False
    factor: float | None = None
    finite: bool = False


class Meet(Said, frozen=True, tag=43):
    """...a period of local steps may be over; its steps stand in the notes. Nothing."""

    settings: dict[Number, bytes]


class Norm(Said, frozen=True, tag=44):
    """...what is the norm of the gradient of all? As in Step; ``chosen``: over which parameters. The norm."""

    exchange: Number
    mask: bytes
    rows: dict[Number, int]
    chosen: bytes
    order: float
    offers: bool = False


class Load(Said, frozen=True, tag=45):
    """...the script has loaded a checkpoint: parameters, whose values have come before, or this state. Nothing."""

    exchange: Number
    parameters: bool
    state: Any


class ShowState(Said, frozen=True, tag=46):
    """...what does the optimizer keep? A document; its tensors have come before."""

    exchange: Number


class Finish(Said, frozen=True, tag=47):
    """...my script has come to its end; has it asked for its rank, and what trained here alone? Nothing."""

    asked_rank: bool
    left_out: list[str]


class Broke(Said, frozen=True, tag=48):
    """...my script has raised. Nothing."""

    failure: Failed


class Counts(Said, frozen=True, tag=49):
    """...I come in the place of another and have not joined. Does what I do count? Joins where nothing else would:
    a script without loaders joins at its first step."""


class Fetching(Said, frozen=True, tag=50):
    """...my first batch that trains is about to be fetched, and I was told that there is something to take before it.
    Nothing, when I have been told to keep it."""


class NeedsGhost(Said, frozen=True, tag=51):
    """...a pass of this loader had no batch for me. Is a ghost to keep the script from finding it empty?"""

    loader: Number


Request = (
    Who
    | WrapOptimizer
    | CopyFirst
    | WrapBuffers
    | WrapLoader
    | Barrier
    | Begin
    | DrawLease
    | DropLease
    | BeginLease
    | More
    | End
    | Step
    | Meet
    | Norm
    | Load
    | ShowState
    | Finish
    | Broke
    | Counts
    | Fetching
    | NeedsGhost
    | Leave
    | IsWhole
    | PushStore
    | PullStore
    | AwaitStore
    | Border
)


# What the deputy asks of the worker, while that waits for an answer.


class Show(Said, frozen=True, tag=60):
    """...what does your script keep? ``random``: with the states of random numbers. Answer: Shown."""

    random: bool = False


class Keep(Said, frozen=True, tag=61):
    """...let your script keep this from now on; its tensors have come before. ``random`` as in Show. Answer: Shown,
    without anything."""

    kept: Any
    random: bool = False


class Fill(Said, frozen=True, tag=69):
    """...what you have asked to share begins with what your script has. Answer: Shown, with the optimizer's state as a
    document; the values have come before."""


class Shown(Said, frozen=True, tag=62):
    """...that is it; its tensors have come before. Or: it could not be done."""

    kept: Any = None
    failure: Failed | None = None


class Ask(Said, frozen=True, tag=2):
    """...do this, after the notes, with what is enclosed. Answer: Answer, or Stop."""

    notes: list[Note]
    request: Request
    enclosed: Sequence[Enclosed] = ()


class Await(msgspec.Struct, frozen=True, array_like=True):
    """The worker is to have what servers elsewhere have (ranges.py) after round, or entry, ``number``. They send it by
    themselves (``comes``), or are to be asked for it, once ``loads`` checkpoints are loaded."""

    number: Number
    comes: bool
    loads: Number


class Status(msgspec.Struct, frozen=True, array_like=True):
    """Where the worker is now. ``epochs``: by loader; ``verdicts``: whether a push of a loader's batches counted, where
    that is new; ``periods``: local steps not brought yet, by exchange; ``fresh``: exchanges whose newest values have
    come before this, with the parameters of which only rows have; ``buffers``: so have the buffers; ``follow``: by
    exchange, the round that a mirror is to step; ``brought``: what a host's mirror is to have; ``apart``: exchanges of
    which the host's workers share a mirror no more; ``awaits``: exchanges of which servers elsewhere have a part.

    ``deals``: by loader, see ``data.passes.Passes.deal``; ``workers``: how many there are to be. Of one that comes in
    another's place: ``joined``, whether the others count with it; ``behind``, whether it has passes to catch up with;
    ``takes``, whether there is something to take before its next batch. ``saves``: at the next border it has to give
    its part of a checkpoint."""

    over: bool = False
    holds: bool = False
    step: int = 0
    epochs: list[int] = []
    verdicts: dict[int, bool] = {}
    periods: list[int] = []
    fresh: dict[int, list[int]] = {}
    buffers: bool = False
    follow: dict[int, Follow] = {}
    brought: dict[int, Brought] = {}
    apart: list[int] = []
    deals: list[Deal | None] = []
    workers: int = 0
    joined: bool = True
    behind: bool = False
    takes: bool = False
    saves: bool = False
    awaits: dict[int, Await] = {}


class Answer(Said, frozen=True, tag=3):
    """...it is done; or the script is to get this exception."""

    status: Status
    value: Any = None
    failure: Failed | None = None


class Stop(Said, frozen=True, tag=4):
    """...the run is being stopped. No answer."""

    reason: str


class Printed(Said, frozen=True, tag=63):
    """...my script has printed this. No answer."""

    data: bytes


class Still(Said, frozen=True, tag=64):
    """...my process has used no processor for so many seconds, and it is not you it waits for. No answer."""

    seconds: float


class Terminated(Said, frozen=True, tag=68):
    """...whoever has started my process wants it to end: let all end behind one step, and save. No answer."""


Any_ = (
    Piece
    | Letter
    | Ask
    | Answer
    | Stop
    | Took
    | Show
    | Keep
    | Fill
    | SendFold
    | SendOwn
    | Close
    | Shown
    | Printed
    | Still
    | Terminated
)
