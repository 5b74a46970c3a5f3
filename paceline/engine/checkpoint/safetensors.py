"""Safetensors files: groups of tensors as pieces to write, and read again where they lie.

A header of names, dtypes, shapes and places, then the values. Knows no torch: a tensor is a buffer with a dtype and a
shape. The format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""What can be stored, by torch's name: the format's name, and bytes a value. The format has no complex128."""

_TENSOR_CHARACTERS = 512
_METADATA = "__metadata__"
_HEADER_BYTES = 100_000_000  # as everywhere


class Tensor(NamedTuple):
    """``data``: the values in C order and this machine's (little-endian) bytes; any contiguous buffer. An alias."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


class Unusable(Exception):
    """Why a checkpoint cannot be used: the rest of a sentence that begins with its name."""


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in the header of a safetensors file; the offsets count from the header's end."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[int, int]


def to_pieces(file: str, group: Mapping[str, Tensor]) -> list[memoryview]:
    """What to write to the file: header, then data, wide values first, so that all are aligned. Raises ConfigError."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # without it some readers refuse the file
    pieces, place = [], 0
    for name, tensor in group.items():
        if not 1 <= len(name) <= _TENSOR_CHARACTERS or not name.isprintable() or name == _METADATA:
            raise ConfigError(
                f"{file} cannot hold a tensor named {name!r}",
                fix=f"1 to {_TENSOR_CHARACTERS} printable characters, not {_METADATA}",
            )
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{file} cannot hold {name}, which is {tensor.dtype}",
                why=f"the safetensors format has {', '.join(DTYPES)}",
            )
    for name, tensor in sorted(group.items(), key=lambda item: -DTYPES[item[1].dtype][1]):
        code, item_bytes = DTYPES[tensor.dtype]
        view = memoryview(tensor.data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # what is empty cannot be cast
        assert len(view) == math.prod(tensor.shape) * item_bytes, (name, tensor.dtype, tensor.shape, len(view))
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": (place, place + len(view))}
        place += len(view)
        pieces.append(view)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise ConfigError(f"{file} cannot hold {len(group):,} tensors: their names and shapes are too long")
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def parse(file: str, data: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file; they alias ``data``."""
    length = int.from_bytes(data[:8], "little")
    if not 8 + length <= len(data) or length > _HEADER_BYTES:
        raise Unusable(f"{file} has no whole header")
    entries = decode(file, msgspec.json.Decoder(dict[str, msgspec.Raw]), data[8 : 8 + length])
    entries.pop(_METADATA, None)
    decoder, values = msgspec.json.Decoder(_Entry), data[8 + length :]
    codes = {code: (dtype, item_bytes) for dtype, (code, item_bytes) in DTYPES.items()}
    tensors: dict[str, Tensor] = {}
    place = 0
    found = [(name, decode(file, decoder, raw)) for name, raw in entries.items()]
    for name, entry in sorted(found, key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        dtype, item_bytes = codes.get(entry.dtype, ("", 0))
        if not dtype or start != place or stop - start != math.prod(entry.shape) * item_bytes or stop > len(values):
            raise Unusable(f"{file} has no place for its tensor {name!r}")
        tensors[name] = Tensor(dtype, entry.shape, values[start:stop])
        place = stop
    if place != len(values):
        raise Unusable(f"{file} has {len(values) - place} bytes that belong to no tensor")
    return tensors


def decode(file: str, decoder: msgspec.json.Decoder[Any], text: Any) -> Any:
    """The JSON in a file. Raises Unusable."""
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"{file} does not say what it should: {error}") from None
