"""The spec of an exchange as another process has told it: what it claims is looked at before memory is made of it."""

from __future__ import annotations

import math

import msgspec
from torch import optim

from paceline.config import MAX_COMPENSATION, MAX_SERVERS, MAX_WORKERS
from paceline.engine.elsewhere.mail import MOST_BYTES
from paceline.engine.elsewhere.making import check
from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.optimizers import StateItem
from paceline.params.table import DTYPES, Table
from paceline.protocol.partition import padded
from paceline.transport.slots import Spec

_MOST_SETTINGS_BYTES = 2**24


def decode(data: bytes) -> Spec:
    """Raises ConfigError for what is none, or cannot be."""
    try:
        spec = msgspec.msgpack.decode(data, type=Spec)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"a spec has come that is none: {error}") from None
    mistake = _of_counts(spec) or _of_table(spec.table, len(optimizers.decode(spec.settings)))
    mistake = mistake or next(filter(None, (_of_state(item, spec.table) for item in spec.state)), None)
    if mistake is not None:
        raise ConfigError(f"a spec has come that cannot be: {mistake}")
    return spec


def find_optimizer(spec: Spec) -> type[optim.Optimizer]:
    """Its class. Raises ConfigError where that is not here."""
    found = optimizers.find_class(spec.optimizer)
    if not issubclass(found, optim.Optimizer):
        raise ConfigError(f"a spec has come that cannot be: {spec.optimizer} is no optimizer")
    return found


def _of_counts(spec: Spec) -> str | None:
    # Into how many parts is cut, and for how many a grid is made: somewhat above one a server or worker.
    for what, count, least, most in (
        ("workers", spec.workers, 1, MAX_WORKERS),
        ("servers", spec.servers, 0, MAX_SERVERS),
        ("parts", spec.parts, 0, 2**16),
        ("shares", spec.shares, 0, 2**16),
        ("hosts", spec.hosts, 1, MAX_SERVERS),
        ("bytes of settings", spec.settings_bytes, len(spec.settings), _MOST_SETTINGS_BYTES),
    ):
        if not least <= count <= most:
            return f"{count} {what}, not {least} to {most}"
    return None if 0 <= spec.compensate <= MAX_COMPENSATION else f"compensation of {spec.compensate}"


def _of_table(table: Table, groups: int) -> str | None:
    check(table.entries)
    sizes: dict[str, int] = {}
    for entry in table.entries:
        size = math.prod(entry.shape)
        last = sum((count - 1) * step for count, step in zip(entry.shape, entry.stride, strict=True)) if size else 0
        is_as_rows = entry.row == 0 or (size and entry.shape[1:] == (entry.row,) and entry.stride == (entry.row, 1))
        if entry.size != size or last > max(size - 1, 0) or not is_as_rows or not 0 <= entry.group < groups:
            return f"{entry.name} of shape {entry.shape} in group {entry.group} of {groups}: {entry}"
        if entry.offset != sizes.get(entry.vector, 0):
            return f"{entry.name} from value {entry.offset} of vector {entry.vector}"
        sizes[entry.vector] = entry.offset + padded(size)
    return None if sizes == table.sizes else f"vectors of {table.sizes} values, which are of {sizes}"


def _of_state(item: StateItem, table: Table) -> str | None:
    if item.dtype not in DTYPES or not 0 <= item.param < len(table.entries) or min(item.shape, default=0) < 0:
        return f"state {item}"
    fits = {
        "like": item.shape == table.entries[item.param].shape,
        "tensor": math.prod(item.shape) * DTYPES[item.dtype].itemsize <= MOST_BYTES,
        "int": not item.shape,
        "float": not item.shape,
    }
    return None if fits.get(item.kind) else f"state {item}"
