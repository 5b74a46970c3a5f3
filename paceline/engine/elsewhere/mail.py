"""Arrays that come over a link: where their pieces belong, and sending them in pieces."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.params.packing import Tensors, pack, unpack
from paceline.params.table import DTYPES, dtype_name
from paceline.protocol.link import Number, Patience, Senseless
from paceline.protocol.remote import Ask, Enclosed, Letter, Piece, Took
from paceline.transport.ends import Event, Received
from paceline.transport.link import Link

# A host that is cut off, or a process that was killed, is lost within 8 s.
PATIENCE = Patience(heartbeat_s=0.5, silence_s=3.0, give_up_s=5.0)
_PIECE_BYTES = 2 * 2**20
LETTER_BYTES = 128 * 1024  # to copy so much takes less than to send a message of its own
# Of what has come and is not taken: the peer has the job key, but may be of another mind about its own size.
MOST_BYTES = 2**38

_Packed = tuple[Any, dict[str, tuple[str, tuple[Number, ...]]]]  # a document; its tensors' dtypes and shapes


class Mail:
    """What has come over one link. ``events`` are taken by the thread that works; ``place`` is called by the link's."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._places: dict[str, memoryview] = {}
        self._rooms: dict[str, memoryview] = {}
        self.on_took: Callable[[Took], None] = lambda took: None
        self._boxes: dict[str, bytearray] = {}
        self._boxes_bytes = 0
        self.received_bytes = 0

    def expect(self, what: str, tensor: torch.Tensor) -> None:
        """From now on arrays of this name go straight into ``tensor``, which nobody may be using when they come."""
        if tensor.numel():
            self._places[what] = as_bytes(tensor)

    def make_room(self, what: str, tensor: torch.Tensor) -> None:
        """As ``expect``, for arrays that are at most as large."""
        self._rooms[what] = as_bytes(tensor)

    def sink(self, event: Event) -> None:
        """For a link's end. A Took is told at once: the thread that works may be waiting for what it sets free."""
        if isinstance(event, Received) and isinstance(event.message, Took):
            self.on_took(event.message)
        else:
            self.put(event)

    def put(self, event: Event) -> None:
        """For the thread that works, but for what is enclosed. Raises Senseless."""
        if isinstance(event, Received):
            self.open(event.message)
            if isinstance(event.message, Letter):
                return
        self.events.put(event)

    def open(self, message: Any) -> None:
        """Lay what is enclosed where it belongs. Raises Senseless."""
        if not isinstance(message, Letter | Ask):
            return
        for one in message.enclosed:
            room = self.place(None, Piece(one.what, one.start, one.total), len(one.data))
            if room is None:
                raise Senseless(f"{len(one.data)} bytes of {one.what} are enclosed, which nobody expects")
            room[:] = one.data

    def take(self, what: str, dtype: torch.dtype, shape: Sequence[int] = (-1,)) -> torch.Tensor:
        """An array that has come and was not expected; flat, or in this shape. Raises ConfigError where it has
        another."""
        data = self._boxes.pop(what, bytearray())
        self._boxes_bytes -= len(data)
        try:
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
            return flat.view(tuple(shape))
        except (ValueError, RuntimeError):  # what torch says of it is not for people
            raise ConfigError(f"{what} came as {len(data)} bytes; {dtype} of shape {list(shape)} is expected") from None

    def take_into(self, what: str, tensor: torch.Tensor) -> None:
        """Copy an array of the tensor's shape that has come into it. Where none has, the tensor stays as it is. Raises
        ConfigError."""
        if what in self._boxes:
            with torch.no_grad():
                tensor.copy_(self.take(what, tensor.dtype, tensor.shape))

    def take_document(self, prefix: str, told: Any) -> Any:
        """What ``send_document`` has sent. Empty for nothing. Raises ConfigError for what that does not send."""
        if not told:
            return {}
        return _unpacked(prefix, *self.take_packed(prefix, told))

    def take_states(
        self, prefix: str, told: Any, parameters: Sequence[nn.Parameter]
    ) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """An optimizer's state that has come as a document, by parameter. Raises ConfigError."""
        return _by_parameter(prefix, self.take_document(prefix, told), parameters)

    def take_packed(self, prefix: str, told: Any) -> tuple[Any, Tensors]:
        """What ``send_packed`` has sent. Raises ConfigError for what that does not send."""
        document, described = _read(prefix, told)
        return document, {
            key: self.take(f"{prefix}/{place}", DTYPES[dtype], shape)
            for place, (key, (dtype, shape)) in enumerate(described.items())
        }

    def place(self, link: Link | None, message: Any, size_bytes: int) -> memoryview | None:
        if not isinstance(message, Piece):
            return None
        home = self._places.get(message.what)
        if home is None and 0 < message.total <= len(self._rooms.get(message.what, b"")):
            home = self._rooms[message.what][: message.total]
        if home is None:
            box = self._boxes.get(message.what)
            if box is None or (message.start == 0 and len(box) != message.total):
                box = self._make_box(message.what, message.total)
                if box is None:
                    return None
            home = memoryview(box)
        stop = message.start + size_bytes
        if message.start < 0 or stop > len(home) or len(home) != message.total:
            return None
        self.received_bytes += size_bytes
        return home[message.start : stop]

    def _make_box(self, what: str, size_bytes: int) -> bytearray | None:
        """For an array of this name; None for one that is too large. Pages that nothing comes to take no memory."""
        others_bytes = self._boxes_bytes - len(self._boxes.get(what, b""))
        if not 0 < size_bytes <= self._most_bytes - others_bytes:
            return None
        try:
            box = self._boxes[what] = bytearray(size_bytes)
        except MemoryError:
            return None
        self._boxes_bytes = others_bytes + size_bytes
        return box


class Letters:
    """Arrays for ``link``: small ones together, in the body of one message, where they are copied."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._enclosed: list[Enclosed] = []
        self._bytes = 0

    def add(self, what: str, tensor: torch.Tensor, first: int, end: int) -> int:
        """Values ``[first, end)`` of a tensor, which if they are many must not be changed until the peer has answered;
        their bytes. Raises LinkEnded."""
        item = tensor.element_size()
        size = (end - first) * item
        if self._bytes + size > LETTER_BYTES:
            self.send()
        if size > LETTER_BYTES:
            return send_range(self._link, what, tensor, first, end)
        if size:
            data = as_bytes(tensor)
            enclosed = Enclosed(what, first * item, len(data), bytes(data[first * item : end * item]))
            self._enclosed.append(enclosed)
            self._bytes += size
        return size

    def take(self) -> list[Enclosed]:
        """What has not been sent, for another message to enclose."""
        enclosed, self._enclosed, self._bytes = self._enclosed, [], 0
        return enclosed

    def send(self) -> None:
        """All of it. Raises LinkEnded."""
        if self._enclosed:
            self._link.send(Letter(self.take()))


def send(link: Link, what: str, tensor: torch.Tensor) -> int:
    """Send a tensor, which must not be changed until the peer has answered; its bytes. Raises LinkEnded."""
    return send_range(link, what, tensor, 0, tensor.numel())


def send_range(link: Link, what: str, tensor: torch.Tensor, first: int, end: int) -> int:
    """The same of values ``[first, end)`` of it."""
    data = as_bytes(tensor)
    first, end = first * tensor.element_size(), end * tensor.element_size()
    for start in range(first, end, _PIECE_BYTES):
        link.send(Piece(what, start, len(data)), data[start : min(start + _PIECE_BYTES, end)])
    return end - first


def send_document(link: Link, prefix: str, value: Any) -> Any:
    """Send the tensors in ``value``, a dict of any nesting; what ``take_document`` must be told. Raises ConfigError."""
    if not value:
        return None
    tensors: Tensors = {}
    return send_packed(link, prefix, pack(value, tensors, prefix), tensors)


def send_packed(link: Link, prefix: str, document: Any, tensors: Tensors) -> Any:
    """The same of a document that has been made already."""
    for place, tensor in enumerate(tensors.values()):
        send(link, f"{prefix}/{place}", tensor.cpu())
    return _described(document, tensors)


def describe_document(value: Any) -> Any:
    """Of a document that is not sent, what ``without_values`` must be told. Raises ConfigError."""
    tensors: Tensors = {}
    return _described(pack(value, tensors, ""), tensors) if value else None


def without_values(
    prefix: str, told: Any, parameters: Sequence[nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """As ``take_states``, of a document that was described: its tensors have types and shapes, and take no memory."""
    if not told:
        return []
    document, described = _read(prefix, told)
    # Of a tensor without values a size may be any, but for this.
    counts = [math.prod(max(size, 1) for size in shape) for _, shape in described.values()]
    if sum(n * DTYPES[dtype].itemsize for n, (dtype, _) in zip(counts, described.values(), strict=True)) > MOST_BYTES:
        raise ConfigError(f"a {prefix} was told of that takes more than {MOST_BYTES >> 30} GB")
    tensors = {key: torch.zeros(shape, dtype=DTYPES[dtype], device="meta") for key, (dtype, shape) in described.items()}
    return _by_parameter(prefix, _unpacked(prefix, document, tensors), parameters)


def _read(prefix: str, told: Any) -> _Packed:
    """A document and what is told of its tensors. Raises ConfigError."""
    try:
        document, described = msgspec.convert(told, _Packed)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no {prefix} can be made of what has come: {error}") from None
    for key, (dtype, _) in described.items():
        if dtype not in DTYPES:
            raise ConfigError(f"{key} came as {dtype}, which is not one of {', '.join(DTYPES)}")
    return document, described


def _unpacked(prefix: str, document: Any, tensors: Tensors) -> Any:
    try:
        return unpack(document, tensors)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no {prefix} can be made of what has come: {error!r}") from None


def _by_parameter(
    prefix: str, document: Any, parameters: Sequence[nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    places = {str(place): parameter for place, parameter in enumerate(parameters)}
    if not isinstance(document, dict) or not all(
        place in places and isinstance(values, dict) for place, values in document.items()
    ):
        raise ConfigError(f"a {prefix} has come that is not of {len(places)} parameters")
    return [(places[place], values) for place, values in document.items()]


def _described(document: Any, tensors: Tensors) -> Any:
    return document, {key: (dtype_name(tensor.dtype, key), tuple(tensor.shape)) for key, tensor in tensors.items()}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor on the CPU, as they lie in memory; of one that is not contiguous a copy's."""
    flat = tensor.detach().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")
