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
    ``spec`` describes tensors and optimizer, the same bytes from every worker. ``by_place``: which ranges of the memory
    have a part for every place (transport/segment.py). Answer: Memory, or Stop.
    """

    number: int
    kind: str
    spec: bytes
    size_bytes: int
    what: str
    by_place: tuple[tuple[int, int, int], ...] = ()


class Memory(Message, frozen=True, tag=2):
    """...here is collective ``number``'s memory (one descriptor). Servers get the spec too. No answer."""

    number: int
    size_bytes: int
    kind: str = ""
    spec: bytes = b""
    by_place: tuple[tuple[int, int, int], ...] = ()


class Steps(Message, frozen=True, tag=3):
    """...these rounds are behind me: ``rows`` is float64[n, 14], see engine/launcher/metrics.py. No answer."""

    rows: bytes


class Logged(Message, frozen=True, tag=4):
    """...worker 0's script logged these values for round ``step``. No answer."""

    step: int
    values: dict[str, float]


class LoggedBehind(Message, frozen=True, tag=17):
    """...my script logged these behind epoch ``epoch`` (from 1), of so many samples of mine. No answer."""

    epoch: int
    loss: float | None
    samples: int
    values: dict[str, float]


class Pass(Message, frozen=True, tag=5):
    """...I begin pass ``number`` (from 0) over loader ``loader`` of ``steps`` batches. No answer."""

    loader: int
    number: int
    steps: int | None


INTERRUPTED = "interrupted"  # a reason of ``Ended``


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
    """...zygote, fork a process of this role; its descriptors come with this. Answer: Forked, later Exited.

    ``birth`` counts the processes that have had this place: one that is there, or has been, is not forked again.
    """

    role: str
    rank: int
    setup: bytes
    birth: int = 1


class Forked(Message, frozen=True, tag=11):
    """...the process exists (one descriptor: the other end of its channel). No answer."""

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


class Joined(Message, frozen=True, tag=40):
    """...I have come to a place that nobody had, and train from here on, in epoch ``epoch``; or, as a server, I am
    there. No answer."""

    epoch: int


class Scale(Message, frozen=True, tag=41):
    """...user of this host, let the run have so many workers, and servers (None: as it has). Answer: Scaled."""

    workers: int | None = None
    servers: int | None = None


class Scaled(Message, frozen=True, tag=42):
    """...so it shall be: ``told``, a sentence each; or, if ``failure`` has a kind as Failed has, why not. No answer."""

    told: tuple[str, ...] = ()
    kind: str = ""
    what: str = ""
    why: str = ""
    fix: str = ""


class Alarm(Message, frozen=True, tag=15):
    """...something the user must hear went wrong, and training goes on. No answer."""

    text: str


class Reads(Message, frozen=True, tag=43):
    """...a loader of mine reads data of this ``fingerprint`` (data/fingerprint.py). No answer."""

    loader: int
    fingerprint: int


class Hold(Message, frozen=True, tag=30):
    """...launcher to front: keep this (one descriptor) for whoever launches after me, in place of what had its name
    ``(what, role, rank, number)``; front to launcher: this is what I keep. No answer."""

    what: str
    role: str = ""
    rank: int = 0
    number: int = 0
    about: bytes = b""


class Begin(Message, frozen=True, tag=31):
    """...front to launcher: you know all that I keep; launch, or go on. Answer: Show, Hold, at the end Outcome.

    ``directory``: the run's, as the user is to see it; ``after``, ``steps``: the last round and step of a run that is
    resumed; ``shown``: how far into each file of the run the user has seen; ``deaths``: of launchers, sentences that
    the user has not seen.
    """

    setup: bytes
    directory: str
    argv: list[str]
    front: int
    resumed: bool = False
    after: int = 0
    steps: int = 0
    shown: dict[str, int] = {}
    deaths: list[str] = []


class Show(Message, frozen=True, tag=32):
    """...launcher to front: show these records (msgpack), with which ``file`` is shown up to ``place``. No answer."""

    file: str
    place: int
    records: bytes


class Drop(Message, frozen=True, tag=37):
    """...launcher to front: the parts of checkpoints up to ``number`` need not be held any more. No answer."""

    number: int


class Interrupt(Message, frozen=True, tag=33):
    """...front to launcher: the user has asked for the end, now so many times. Or a deputy, once: whoever has started
    its worker has. No answer."""

    times: int


class Abandon(Message, frozen=True, tag=34):
    """...front to launcher: I cannot go on; stop everyone and leave files that say so. No answer."""

    reason: str


class Outcome(Message, frozen=True, tag=35):
    """...launcher to front: the run is over, and has failed if ``failure``. No answer."""

    summary: bytes
    failure: Failed | None = None


class Letter(Message, frozen=True, tag=36):
    """...what I say is too long for a frame: it is in memory of its own (one descriptor, before its own)."""

    size_bytes: int


class Kept(Message, frozen=True, tag=16):
    """...what my script keeps of its own, for the newcomer ``rank`` that has asked for the ``number``-th time (one
    descriptor: the tensors' memory; none where ``layout``, as in Part, is empty). The launcher sends it on."""

    rank: int
    number: int
    layout: bytes


Any = (
    Wrap
    | Memory
    | Steps
    | Logged
    | LoggedBehind
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
    | Reads
    | Hold
    | Begin
    | Show
    | Interrupt
    | Abandon
    | Outcome
    | Letter
    | Kept
    | Drop
    | Joined
    | Scale
    | Scaled
)
