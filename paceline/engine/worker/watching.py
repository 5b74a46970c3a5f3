"""What a script does to a wrapped model, heard without leaving anything in it.

Attributes and hooks of a model are copied and saved with it; what is done to a copy is nobody's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from paceline.engine.worker.weights import Zeroing


class Watcher(Protocol):
    """A worker, here or of one elsewhere."""

    zeroing: Zeroing

    def loaded(self, parameters: Iterable[nn.Parameter]) -> None: ...


# A worker knows its models, so neither may keep the other alive from here.
_watchers: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Watcher]] = weakref.WeakKeyDictionary()
_usual_zero_grad, _usual_load = nn.Module.zero_grad, nn.Module.load_state_dict


def watch(model: nn.Module, watcher: Watcher) -> None:
    """From now on ``watcher`` hears of the model's ``zero_grad``, and when it is loaded, alone or in another."""
    _watchers.setdefault(model, weakref.WeakSet()).add(watcher)
    nn.Module.zero_grad = _zero_grad  # type: ignore[method-assign, assignment]
    nn.Module.load_state_dict = _load_state_dict  # type: ignore[method-assign, assignment]


def _zero_grad(model: nn.Module, set_to_none: bool = True) -> None:
    _usual_zero_grad(model, set_to_none)
    for watcher in _watchers.get(model, ()):
        watcher.zeroing.zeroed_in(model)


def _load_state_dict(model: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return _usual_load(model, state_dict, *args, **kwargs)
    finally:  # what fits is loaded also where something does not
        for module in model.modules():
            for watcher in _watchers.get(module, ()):
                watcher.loaded(module.parameters())
