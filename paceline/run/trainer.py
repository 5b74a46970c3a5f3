"""``Trainer`` and ``fit``: train a model in one call, without writing a loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paceline.config import Pace
from paceline.errors import ConfigError
from paceline.events import Record, Summary
from paceline.run.launch import launch
from paceline.run.session import init

Loss = Callable[[Any, Any], torch.Tensor]
_MODEL = "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """What training left: the trained model (the object that was given), one dict a step, the run's directory."""

    model: nn.Module
    history: list[dict[str, Any]]
    directory: Path
    summary: Summary


class Trainer:
    """Trains ``model`` on ``data`` with ``workers`` processes.

    ``data`` is a DataLoader, a Dataset of (input, target), or a tuple of tensors; ``batch_size`` is per worker and
    for the latter two. ``loss(model(x), y)`` is cross entropy for integer targets, else mean squared error, unless
    given. ``optimizer`` is one made over the model's parameters (AdamW with its defaults unless given).
    ``options`` are fields of ``paceline.Job``: servers, assign, seed, steps, until_loss, patience, runs, threads.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        workers: int = 2,
        pace: str | Pace = "sync",
        epochs: int = 1,
        batch_size: int = 32,
        loss: Loss | None = None,
        optimizer: optim.Optimizer | None = None,
        watch: Callable[[Record], None] | None = None,
        **options: Any,
    ) -> None:
        if epochs < 1:
            raise ConfigError(f"epochs is {epochs}; it must be 1 or more")
        self.model = model
        self._loader = _loader(data, batch_size)
        self._loss = loss or _usual_loss
        self._optimizer = optimizer or optim.AdamW(model.parameters())
        self._workers, self._pace, self._epochs = workers, pace, epochs
        self._watch, self._options = watch, {"name": type(model).__name__.lower(), **options}

    def train(self) -> Trained:
        """Train to the end; blocks. The given model has the trained values then. Raises a PacelineError."""
        parts = (self.model, self._optimizer, self._loader, self._loss, self._epochs)
        summary = launch(_train, parts, workers=self._workers, pace=self._pace, watch=self._watch, **self._options)
        directory = Path(summary.run)
        with torch.no_grad():
            self.model.load_state_dict(load_file(directory / _MODEL))
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return Trained(self.model, [json.loads(line) for line in lines], directory, summary)


def fit(model: nn.Module, data: Any, **options: Any) -> Trained:
    """``Trainer(model, data, **options).train()``."""
    return Trainer(model, data, **options).train()


def _train(
    rank: int, model: nn.Module, optimizer: optim.Optimizer, loader: DataLoader[Any], loss_of: Loss, epochs: int
) -> None:
    """What worker ``rank`` runs."""
    run = init()
    model, optimizer, loader = run.wrap(model, optimizer, loader)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
    if run.is_main:
        # Tied tensors are saved once each under every name, as load_state_dict wants them back.
        save_file(
            {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()},
            run.directory / _MODEL,
        )


def _usual_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.dtype in (torch.int64, torch.uint8):
        return nn.functional.cross_entropy(output, target.long())
    return nn.functional.mse_loss(output, target)


def _loader(data: Any, batch_size: int) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, tuple | list) and data and all(isinstance(part, torch.Tensor) for part in data):
        data = TensorDataset(*data)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=batch_size, shuffle=True)
    raise ConfigError(
        f"data is a {type(data).__name__}; it must be a DataLoader, a Dataset, or a tuple of tensors (x, y)"
    )
