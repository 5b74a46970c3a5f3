"""The table of an optimizer's parameters: which range of which flat vector each of them is.

There is one flat vector per dtype, and one more per dtype for parameters whose gradients come as sparse rows: those
are never copied as a whole. Every parameter starts at a multiple of ALIGN values and is padded to one,
so that a piece of it never needs the scalar tail of a vector kernel. The table is plain data: it is
compared between workers, sent to servers, and knows no tensor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Container, Iterable
from functools import cache

import msgspec
import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.protocol.partition import ALIGN, padded

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS = " rows"


class Entry(msgspec.Struct, frozen=True):
    """Parameter ``name``: ``size`` values from ``offset`` of its vector, laid out by ``stride``.

    ``row`` is the number of values in a row if its gradient comes as sparse rows (params/rows.py), 0 if dense.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    group: int
    offset: int
    size: int
    row: int = 0

    @property
    def vector(self) -> str:
        """The key of the vector that the parameter lies in."""
        return self.dtype + _ROWS if self.row else self.dtype

    @property
    def grain(self) -> int:
        """Cuts within the parameter fall on multiples of so many values: on whole rows."""
        return math.lcm(ALIGN, self.row or 1)

    @property
    def rows(self) -> int:
        """Rows of the table, 0 if the gradient is dense."""
        return self.size // self.row if self.row else 0


class Table(msgspec.Struct, frozen=True):
    """``sizes[vector]`` is the length of that vector in values, padding included.

    Vectors are named by their dtype, those of parameters with sparse rows by dtype and " rows".
    """

    entries: tuple[Entry, ...]
    sizes: dict[str, int]

    @property
    def values(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def dense_sizes(self) -> dict[str, int]:
        """``sizes`` without the vectors of parameters with sparse rows."""
        return {vector: size for vector, size in self.sizes.items() if not vector.endswith(_ROWS)}

    def offsets_bytes(self) -> dict[str, int]:
        """Where each vector begins when all are laid one after the other; "" is the end."""
        return lay_out(self.sizes)

    def view(self, entry: Entry, vector: torch.Tensor) -> torch.Tensor:
        """The parameter's own shape over its range of ``vector`` (an alias)."""
        return vector.as_strided(entry.shape, entry.stride, vector.storage_offset() + entry.offset)


def decode(data: bytes) -> Table:
    """A table as another process has told it. Raises ConfigError for what is none."""
    try:
        return msgspec.msgpack.decode(data, type=Table)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a table has come that is none: {error}") from None


def zeros(shape: tuple[int, ...], stride: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor of its own, laid out as an entry says."""
    return torch.empty_strided(shape, stride, dtype=DTYPES[dtype]).zero_()


def lay_out(sizes: dict[str, int]) -> dict[str, int]:
    """Where vectors of these sizes begin, in bytes, when laid one after the other; "" is the end."""
    place, offsets = 0, {}
    for vector, size in sizes.items():
        offsets[vector] = place
        place += size * vector_dtype(vector).itemsize
        place += -place % 64
    return offsets | {"": place}


def vector_dtype(vector: str) -> torch.dtype:
    """The dtype of the values in the vector of this name."""
    return DTYPES[vector.removesuffix(_ROWS)]


def dtype_name(dtype: torch.dtype, what: str) -> str:
    name = _NAMES.get(dtype)
    if name is None:
        raise ConfigError(f"{what} has dtype {dtype}; it must be one of: {', '.join(DTYPES)}")
    return name


def tabulate(tensors: Iterable[tuple[str, int, torch.Tensor]], with_rows: Container[int] = ()) -> Table:
    """The table of ``(name, group, tensor)``s, in their order. Raises ConfigError for what cannot be shared.

    Gradients of the tensors whose ids are in ``with_rows`` come as sparse rows: these must be 2-D and contiguous.
    """
    entries: list[Entry] = []
    sizes: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for name, group, tensor in tensors:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ConfigError(
                f"parameter {name} is lazy and has no shape yet",
                fix="run one forward pass with a batch before run.wrap",
            )
        dtype = dtype_name(tensor.dtype, f"parameter {name}")
        if tensor.layout is not torch.strided:
            raise ConfigError(f"parameter {name} has layout {tensor.layout}; it must be dense (torch.strided)")
        spans.append((*_span(tensor), name))
        shape, stride = tuple(tensor.shape), _dense_stride(tensor)
        row = shape[1] if id(tensor) in with_rows else 0
        vector = dtype + _ROWS if row else dtype
        offset = sizes.get(vector, 0)
        entries.append(Entry(name, shape, stride, dtype, group, offset, tensor.numel(), row))
        sizes[vector] = offset + padded(tensor.numel())
    _check_apart(spans)
    return Table(tuple(entries), sizes)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Have two tensors of one shape and dtype the same values, bit by bit? A third of what torch.equal takes."""
    if a.device.type != "cpu" or b.device.type != "cpu" or not (a.is_contiguous() and b.is_contiguous()):
        return a.device == b.device and torch.equal(a, b)
    return bool(_memcmp()(a.data_ptr(), b.data_ptr(), a.nbytes) == 0)


@cache
def _memcmp() -> Callable[[int, int, int], int]:
    """To look it up takes longer than to compare 100 KB."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return memcmp


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The memory that is surely the tensor's own: all of it without gaps, its first value with."""
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    values = extent if 0 < extent <= tensor.numel() else min(tensor.numel(), 1)
    return tensor.data_ptr(), tensor.data_ptr() + values * tensor.element_size()


def _check_apart(spans: list[tuple[int, int, str]]) -> None:
    """Each parameter is going to have a range of its own: memory that two of them share would come apart."""
    last_stop, last = 0, ""
    for start, stop, name in sorted(span for span in spans if span[0] < span[1]):
        if start < last_stop:
            raise ConfigError(
                f"parameters {last} and {name} are two objects over one memory",
                fix=f"tie them by assignment, so that they are one Parameter: b.weight = a.weight ({name})",
            )
        if stop > last_stop:
            last_stop, last = stop, name


def differences(mine: Table, other: Table, mine_is: str, other_is: str) -> str:
    """The first difference of two tables in words, or "" if they agree."""
    for a, b in zip(mine.entries, other.entries, strict=False):
        if a != b:
            return (
                f"{a.name} {list(a.shape)} {a.vector} in group {a.group} on {mine_is}, "
                f"{b.name} {list(b.shape)} {b.vector} in group {b.group} on {other_is}"
            )
    if len(mine.entries) != len(other.entries):
        return f"{len(mine.entries)} parameters on {mine_is}, {len(other.entries)} on {other_is}"
    return ""


def names_of(tensors: Iterable[torch.Tensor], models: Iterable[nn.Module]) -> dict[int, str]:
    """id -> name as in ``named_parameters`` of the models, for the tensors that have one."""
    wanted = {id(tensor) for tensor in tensors}
    names: dict[int, str] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if id(parameter) in wanted:
                names.setdefault(id(parameter), name)
    return names


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides if it fills its memory without gaps (channels_last does), else contiguous ones."""
    if tensor.numel() and not tensor.is_contiguous():
        steps = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1)
        expected = 1
        for step, length in steps:
            if step != expected:
                break
            expected *= length
        else:
            return tuple(tensor.stride())
    strides, step = [], 1
    for length in reversed(tensor.shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))
