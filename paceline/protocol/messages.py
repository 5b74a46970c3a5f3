"""What workers, servers and the coordinator tell each other: one struct a message, no number reused.

Each docstring finishes "the sender says ..." and names the answers. File descriptors travel beside the
frame, not in it.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag_field="t", array_like=True):
    """Base of all messages: a msgpack array that begins with the tag."""


class Wrap(Message, frozen=True, tag=1):
    """...I am about to share these tensors (collective number ``number``); give me the memory.

    ``kind`` is "exchange" (an optimizer's parameters) or "copy" (tensors equalised from worker 0).
    ``spec`` describes tensors and optimizer, the same bytes from every worker. Answer: Memory, or Stop.
    """

    number: int
    kind: str
    spec: bytes
    size_bytes: int
    what: str


class Memory(Message, frozen=True, tag=2):
    """...here is collective ``number``'s memory (one descriptor). Servers get the spec too. No answer."""

    number: int
    size_bytes: int
    kind: str = ""
    spec: bytes = b""


class Steps(Message, frozen=True, tag=3):
    """...these rounds are behind me: ``rows`` is float64[n, 13], see engine/metrics.py. No answer."""

    rows: bytes


class Logged(Message, frozen=True, tag=4):
    """...worker 0's script logged these values for round ``step``. No answer."""

    step: int
    values: dict[str, float]


class Pass(Message, frozen=True, tag=5):
    """...I begin pass ``number`` (from 0) over loader ``loader`` of ``steps`` batches. No answer."""

    loader: int
    number: int
    steps: int | None


class Ended(Message, frozen=True, tag=6):
    """...training is over, all agree, for this reason. No answer."""

    reason: str


class Failed(Message, frozen=True, tag=7):
    """...my script raised or I cannot go on. ``kind`` names a class of errors.py. Answer: Stop to all."""

    kind: str
    what: str
    why: str = ""
    fix: str = ""
    traceback: str = ""


class Finished(Message, frozen=True, tag=8):
    """...my script came to its end. No answer."""


class Stop(Message, frozen=True, tag=9):
    """...stop now; ``reason`` is for your log. No answer."""

    reason: str


class Fork(Message, frozen=True, tag=10):
    """...zygote, fork a process of this role; its descriptors come with this. Answer: Forked, later Exited."""

    role: str
    rank: int
    setup: bytes


class Forked(Message, frozen=True, tag=11):
    """...the process exists. No answer."""

    role: str
    rank: int
    pid: int


class Exited(Message, frozen=True, tag=12):
    """...a process I forked has ended; ``status`` is an exit code, or minus the signal. No answer."""

    role: str
    rank: int
    pid: int
    status: int


class Ready(Message, frozen=True, tag=13):
    """...I have imported torch and can fork. No answer."""

    versions: dict[str, str]


class Part(Message, frozen=True, tag=14):
    """...here is my part of checkpoint ``number``, made at ``step`` (one descriptor: the tensors' memory).

    ``layout`` is msgpack: {stem: {name: (dtype, shape, offset)}} and {stem: JSON}. No answer.
    """

    number: int
    step: int
    layout: bytes


class Alarm(Message, frozen=True, tag=15):
    """...something the user must hear went wrong, and training goes on. No answer."""

    text: str


Any = (
    Wrap
    | Memory
    | Steps
    | Logged
    | Pass
    | Ended
    | Failed
    | Finished
    | Stop
    | Fork
    | Forked
    | Exited
    | Ready
    | Part
    | Alarm
)
