"""What scripts keep, as plain documents and tensors: ``state_dict``s of any nesting, without pickle.

A document is what JSON can hold. What it cannot is marked: ``{"$": "tensor", "key": k}`` stands for the tensor stored
under k beside it, and so for tuples, and dicts whose keys are not strings.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError

Tensors = dict[str, torch.Tensor]
_MARK = "$"


def pack(value: Any, tensors: Tensors, where: str) -> Any:
    """``value`` as a document; its tensors go into ``tensors`` under keys that begin with ``where`` (aliases).

    Raises ConfigError for what is neither a number, text, bytes, list, tuple, dict, tensor nor array.
    """
    match value:
        case None | bool() | str():
            return value
        case float() if not math.isfinite(value):
            return {_MARK: "float", "is": repr(value)}
        case int() if not -(2**63) <= value < 2**63:
            return {_MARK: "int", "is": str(value)}
        case int() | float():
            return value
        case bytes():
            return {_MARK: "bytes", "is": base64.b85encode(value).decode()}
        case torch.Tensor():
            tensors[where] = value.detach()
            return {_MARK: "tensor", "key": where}
        case np.generic():
            return pack(value.item(), tensors, where)
        case np.ndarray() if value.dtype.kind in "biuf":
            tensors[where] = torch.from_numpy(np.ascontiguousarray(value).view(_torch_can(value.dtype)))
            return {_MARK: "array", "key": where, "dtype": value.dtype.str}
        case list() | deque():
            return [pack(item, tensors, f"{where}.{place}") for place, item in enumerate(value)]
        case tuple():
            return {_MARK: "tuple", "is": pack(list(value), tensors, where)}
        case dict() | OrderedDict() | defaultdict():
            if all(isinstance(key, str) and key != _MARK for key in value):
                return {key: pack(item, tensors, f"{where}.{key}") for key, item in value.items()}
            pairs = [
                [pack(key, tensors, f"{where}.{place}.key"), pack(item, tensors, f"{where}.{place}")]
                for place, (key, item) in enumerate(value.items())
            ]
            return {_MARK: "pairs", "is": pairs}
    kind = type(value)
    raise ConfigError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be kept",
        why="checkpoints hold numbers, text, lists, dicts and tensors only: loading them must not run code",
        fix="give its class a state_dict() of such values, or leave it out",
    )


def unpack(document: Any, tensors: Tensors) -> Any:
    """What was packed; its tensors are copies."""
    match document:
        case list():
            return [unpack(item, tensors) for item in document]
        case {"$": "float", "is": str(text)}:
            return float(text)
        case {"$": "int", "is": str(text)}:
            return int(text)
        case {"$": "bytes", "is": str(text)}:
            return base64.b85decode(text)
        case {"$": "tensor", "key": str(key)}:
            return tensors[key].clone()
        case {"$": "array", "key": str(key), "dtype": str(dtype)}:
            return tensors[key].numpy().copy().view(_number(dtype))
        case {"$": "tuple", "is": list(items)}:
            return tuple(unpack(item, tensors) for item in items)
        case {"$": "pairs", "is": list(pairs)}:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in pairs}
        case dict():
            return {key: unpack(item, tensors) for key, item in document.items()}
    return document


def _number(name: str) -> np.dtype[Any]:
    """The dtype that was packed. Raises ValueError, TypeError for what is none of those."""
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name!r} is no kind of numbers that is kept")
    return dtype


def _torch_can(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of as many bytes that torch has a tensor of."""
    if dtype.kind == "f" or dtype == np.bool_:
        return dtype.newbyteorder("=")
    return np.dtype(f"i{dtype.itemsize}") if dtype.itemsize > 1 else np.dtype("u1")
