"""What a worker gives to a checkpoint, and what it takes from one.

    model.safetensors       every parameter and buffer, by its name in the model
    optimizer.safetensors   the optimizers' state, as NAME/KEY
    state.json              numbers of rounds, position in the data, stop rules
    worker-N.safetensors, worker-N.json   what worker N has of its own (engine/worker/keeping.py)

Parameters and state are whole, under the names that a plain script knows: how they are cut, and among how many workers,
is not in the files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from torch import nn

from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.exchange.exchange import Exchange
from paceline.errors import ConfigError
from paceline.params.packing import Tensors
from paceline.params.table import DTYPES, dtype_name
from paceline.protocol import messages
from paceline.transport import segment
from paceline.transport.channel import Channel

Own: TypeAlias = "tuple[dict[str, Any], Tensors, bool]"  # what a worker had of its own; was it this one?
Groups = Mapping[str, Mapping[str, torch.Tensor]]


def send(channel: Channel, number: int, step: int, groups: Groups, documents: Mapping[str, Any]) -> None:
    """Copy the tensors into memory of their own, and hand it to the launcher with the documents.

    Raises HostError if there is no memory for it.
    """
    layout, fd = pack(groups, documents)
    try:
        channel.send(messages.Part(number, step, layout), (fd,))
    finally:
        os.close(fd)


def pack(groups: Groups, documents: Mapping[str, Any]) -> tuple[bytes, int]:
    """What is where, and a descriptor of memory with copies of the tensors. Raises HostError."""
    layout: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {stem: {} for stem in groups}
    place = 0
    for stem, group in groups.items():
        for name, tensor in group.items():
            layout[stem][name] = dtype_name(tensor.dtype, name), tuple(tensor.shape), place
            place += -(-tensor.numel() * tensor.element_size() // 64) * 64
    fd = segment.create("a checkpoint", place)
    try:
        memory = segment.attach(fd)
        with torch.no_grad():
            for stem, group in groups.items():
                for name, tensor in group.items():
                    if tensor.numel():
                        start = layout[stem][name][2]
                        home = torch.frombuffer(memory, dtype=tensor.dtype, offset=start, count=tensor.numel())
                        home.view(tensor.shape).copy_(tensor)
    except BaseException:  # whatever it is, the memory is not left behind
        os.close(fd)
        raise
    encoded = {stem: msgspec.json.encode(document) for stem, document in documents.items()}
    return msgspec.msgpack.encode((layout, encoded)), fd


def unpack(layout: bytes, fd: int) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The groups and documents that ``pack`` has put there; the tensors lie in that memory."""
    known, encoded = msgspec.msgpack.decode(layout)
    memory = segment.attach(fd)
    groups: dict[str, Tensors] = {}
    for stem, group in known.items():
        groups[stem] = {}
        for name, (dtype, shape, place) in group.items():
            size = math.prod(shape)
            flat = torch.frombuffer(memory, dtype=DTYPES[dtype], offset=place, count=size) if size else None
            groups[stem][name] = torch.zeros(shape, dtype=DTYPES[dtype]) if flat is None else flat.view(shape)
    return groups, {stem: msgspec.json.decode(document) for stem, document in encoded.items()}


def shared_groups(exchanges: Sequence[Exchange], models: Sequence[nn.Module]) -> dict[str, Tensors]:
    """The groups "model" and "optimizer": aliases, to be copied before they change."""
    model: Tensors = {}
    for index, exchange in enumerate(exchanges):
        for name, values in exchange.shared_values():
            model[_prefix(index) + name] = values
    ours = {id(parameter) for exchange in exchanges for parameter in exchange.parameters}
    for module in models:  # frozen parameters and buffers: not for paceline, but for whoever loads the file elsewhere
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in ours and str(tensor.dtype).removeprefix("torch.") in DTYPES:
                model.setdefault(name, tensor.detach())
    state = {
        f"{_prefix(index)}{name}/{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for index, exchange in enumerate(exchanges)
        for name, values in exchange.shared_state()
        for key, value in values.items()
        if value is not None
    }
    return {"model": model, "optimizer": state}


class Resumed:
    """A checkpoint that this worker's run goes on from. Raises ConfigError if it is not as it was written."""

    def __init__(self, path: Path) -> None:
        self._loaded = Checkpoints(path.parent.parent).load(path)
        self.state: dict[str, Any] = self._loaded.documents["state"]

    def own(self, rank: int) -> Own | None:
        """What worker ``rank`` had of its own, or another where there is none (then the last is False); None if
        nobody's is there."""
        there = sorted(
            int(name.removeprefix("worker-")) for name in self._loaded.documents if name.startswith("worker-")
        )
        if not there:
            return None
        whose = rank if rank in there else there[rank % len(there)]
        return self._loaded.documents[f"worker-{whose}"], dict(self._tensors(f"worker-{whose}")), whose == rank

    def fill(self, index: int, exchange: Exchange) -> None:
        """Worker 0: set the parameters and the state of an exchange that is not shared yet. Raises ConfigError."""
        if index >= len(self.state["exchanges"]):
            raise ConfigError(
                f"the script wraps {index + 1} optimizers, the checkpoint has {len(self.state['exchanges'])}",
                fix="resume with the script as it was",
            )
        prefix = _prefix(index)
        values = dict(self._tensors("model"))
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._tensors("optimizer"):
            parameter, _, key = name.rpartition("/")
            states.setdefault(parameter, {})[key] = tensor
        names = [prefix + name for name, _ in exchange.shared_names()]
        for name, shape in ((prefix + name, shape) for name, shape in exchange.shared_names()):
            found = tuple(values[name].shape) if name in values else None
            if found != shape:
                has = "has none of that name" if found is None else f"has it as {list(found)}"
                raise ConfigError(
                    f"the checkpoint does not fit the model: parameter {name} is {list(shape)}, the checkpoint {has}",
                    fix="resume with the script and the model as they were",
                )
        exchange.fill([values[name] for name in names], [states.get(name, {}) for name in names])

    def _tensors(self, stem: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, shape, data) in self._loaded.tensors.get(stem, {}).items():
            kind = DTYPES[dtype]
            flat = torch.frombuffer(bytearray(data), dtype=kind) if len(data) else torch.zeros(0, dtype=kind)  # type: ignore[arg-type]
            yield name, flat.view(shape)


def _prefix(index: int) -> str:
    """The first optimizer's parameters have the names that the model gives them."""
    return f"optimizer{index}." if index else ""
