"""A batch as bytes and back: tensors, arrays, numbers and text in tuples, lists and dicts. Never pickle.

    length of the head u32 | head: msgpack of (structure, [(dtype, shape)]) | the tensors' bytes, one after the other

The structure is the batch with [kind, ...] in place of what msgpack does not tell apart (a tuple and a list) or does
not know (a tensor: its number).
"""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.params.table import DTYPES, dtype_name

_LENGTH = struct.Struct("<I")
_DEPTH = 16
_NOTHING = torch.empty(0, dtype=torch.uint8)
_PLAIN = (bool, int, float, str, bytes, type(None))


def encode(batch: Any) -> bytes:
    """Raises ConfigError for what cannot be sent."""
    tensors: list[tuple[str, tuple[int, ...], bytes]] = []
    structure = _pack(batch, tensors, 0)
    head = msgspec.msgpack.encode((structure, [(dtype, shape) for dtype, shape, _ in tensors]))
    return b"".join([_LENGTH.pack(len(head)), head, *(data for _, _, data in tensors)])


def decode(data: bytes | bytearray) -> Any:
    """The batch; its tensors are copies. Raises ValueError for bytes that are none of ours."""
    if len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        raise ValueError("an encoded batch ends within its head")
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    try:
        structure, described = msgspec.msgpack.decode(
            memoryview(data)[_LENGTH.size : start], type=tuple[Any, list[tuple[str, tuple[int, ...]]]]
        )
    except msgspec.DecodeError as error:
        raise ValueError(f"an encoded batch has no head: {error}") from None
    tensors = []
    for name, shape in described:
        dtype = DTYPES.get(name)
        count = math.prod(shape) if all(0 <= size < 2**40 for size in shape) else -1
        if dtype is None or not 0 <= count <= (len(data) - start) // dtype.itemsize:
            raise ValueError(f"an encoded batch claims a tensor of {name} {shape}, which its bytes do not hold")
        size = count * dtype.itemsize
        # As bytes first: what lies at an odd address must be moved before it is looked at as numbers.
        raw = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=start).clone() if size else _NOTHING
        tensors.append(raw.view(dtype).view(shape))
        start += size
    return _unpack(structure, tensors, 0)


def _pack(value: Any, tensors: list[tuple[str, tuple[int, ...], bytes]], depth: int) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ["a", _pack(torch.as_tensor(np.asarray(value)), tensors, depth)]
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous()
        data = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        tensors.append((dtype_name(value.dtype, "a tensor of the batch"), tuple(value.shape), data))
        return ["T", len(tensors) - 1]
    if type(value) in _PLAIN:
        return value
    if depth < _DEPTH and type(value) in (tuple, list):
        return ["t" if type(value) is tuple else "l", *(_pack(item, tensors, depth + 1) for item in value)]
    if depth < _DEPTH and type(value) is dict:
        return ["d", *((_pack(k, tensors, depth + 1), _pack(v, tensors, depth + 1)) for k, v in value.items())]
    raise ConfigError(
        f"a batch holds {type(value).__name__}, which cannot be sent to other workers (--data served)",
        fix="tensors, arrays, numbers and text in tuples, lists and dicts; see DataLoader's collate_fn",
    )


def _unpack(value: Any, tensors: list[torch.Tensor], depth: int) -> Any:
    if type(value) in _PLAIN:
        return value
    match value:
        case ["a", ["T", int(number)]] if 0 <= number < len(tensors) and tensors[number].dtype is not torch.bfloat16:
            return tensors[number].numpy()
        case ["T", int(number)] if 0 <= number < len(tensors):
            return tensors[number]
        case ["t", *items]:
            return tuple(_unpack(item, tensors, depth + 1) for item in items)
        case ["l", *items]:
            return [_unpack(item, tensors, depth + 1) for item in items]
        case ["d", *items] if all(isinstance(item, list) and len(item) == 2 for item in items):
            pairs = [(_unpack(k, tensors, depth + 1), _unpack(v, tensors, depth + 1)) for k, v in items]
            with suppress(TypeError):  # a key that no dict takes
                return dict(pairs)
    raise ValueError(f"an encoded batch has a structure that is none of ours: {value!r:.60}")
