"""What a worker has beyond the shared parameters: what a checkpoint, or a newcomer in its place, needs of it.

Random states, schedulers and what else the script keeps (``run.keep``), hyper-parameters, buffers, and at pace local
the state of its own optimizer. All of it as a document and tensors (params/packing.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.params.packing import Tensors, pack, unpack


class Kept(Protocol):
    """What of an exchange is its worker's own: of a local one, or of one elsewhere."""

    @property
    def settings(self) -> Any: ...

    def own_state(self) -> dict[int, dict[str, Any]]: ...

    def load_settings(self, groups: Any) -> None: ...

    def load_own_state(self, state: dict[int, dict[str, Any]]) -> None: ...


class Keeper:
    """Knows what the script wants kept, in the order it said so."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._buffers: list[tuple[str, torch.Tensor]] = []

    def add(self, item: Any) -> None:
        """Raises ConfigError for an object without ``state_dict`` and ``load_state_dict``."""
        if not (callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))):
            raise ConfigError(
                f"run.keep got a {type(item).__name__}; it takes objects with state_dict() and load_state_dict()",
                fix="give its class these two methods, with numbers, text, lists, dicts and tensors",
            )
        pack(item.state_dict(), {}, type(item).__name__)
        if not any(item is known for known in self._objects):
            self._objects.append(item)

    def add_buffers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._buffers += tensors

    def state(self, exchanges: Sequence[Kept], tensors: Tensors, *, random: bool = False) -> dict[str, Any]:
        """All of it, ``random`` states only if asked for; tensors are aliases until they are written. Raises
        ConfigError."""
        states = {"random": pack(_random_states(), tensors, "random")} if random else {}
        return states | {
            "objects": [pack(o.state_dict(), tensors, f"kept.{i}") for i, o in enumerate(self._objects)],
            "kinds": [type(item).__qualname__ for item in self._objects],
            "settings": [pack(exchange.settings, tensors, f"settings.{i}") for i, exchange in enumerate(exchanges)],
            "own": [pack(exchange.own_state(), tensors, f"own.{i}") for i, exchange in enumerate(exchanges)],
            "buffers": [pack(buffer, tensors, f"buffers.{i}") for i, (_, buffer) in enumerate(self._buffers)],
        }

    def load(
        self, document: dict[str, Any], tensors: Tensors, exchanges: Sequence[Kept], *, random: bool = False
    ) -> None:
        """``random``: from here on the same random numbers are drawn as from where the document was made. Raises
        ConfigError if the script keeps other things than it did then."""
        kinds = [type(item).__qualname__ for item in self._objects]
        if document["kinds"] != kinds:
            raise ConfigError(
                f"the script keeps {_listed(kinds)}; the checkpoint has {_listed(document['kinds'])}",
                fix="resume with the script as it was: the same schedulers in run.wrap, the same run.keep",
            )
        for item, state in zip(self._objects, document["objects"], strict=True):
            item.load_state_dict(unpack(state, tensors))
        for exchange, settings, own in zip(exchanges, document["settings"], document["own"], strict=True):
            exchange.load_settings(unpack(settings, tensors))
            exchange.load_own_state(unpack(own, tensors))
        with torch.no_grad():
            for (_, buffer), value in zip(self._buffers, document["buffers"], strict=True):
                buffer.copy_(unpack(value, tensors))
        if random:
            _load_random_states(unpack(document["random"], tensors))


def _load_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    name, keys, *rest = np.random.get_state()
    numpy = (name, np.asarray(keys, dtype=np.int64), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "nothing"
