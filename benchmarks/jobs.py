"""The training jobs that are measured: a model, its loss, and synthetic batches that are made once and kept.

Sizes span what data-parallel training on one host meets: steps of a millisecond with few parameters, where the
exchange is mostly waking and waiting, up to 64 MB of parameters that every step reads and writes whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

Batch = tuple[tuple[Tensor, ...], Tensor]  # what the model takes, and the target

_BATCHES = 8
# So small that the model stays as it began, however many steps it is given: a model that has learnt a few batches
# by heart has vanishing gradients, and CPUs take far longer over denormal numbers.
_LR = 1e-6


def _adamw(model: nn.Module, fused: bool) -> optim.Optimizer:
    """As most scripts have it, without a word on how it steps, or fused."""
    if fused:
        return optim.AdamW(model.parameters(), lr=_LR, fused=True)
    return optim.AdamW(model.parameters(), lr=_LR)


def _sgd(model: nn.Module, fused: bool) -> optim.Optimizer:
    assert not fused, "torch has no fused kernel for sparse gradients"
    return optim.SGD(model.parameters(), lr=_LR)


@dataclass(frozen=True)
class Job:
    """``samples`` are those of one step of one worker; ``draw`` makes a batch of them. ``optimizer(model, fused)``.
    ``clip``: the largest norm of a gradient."""

    name: str
    told: str
    samples: int
    model: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    optimizer: Callable[[nn.Module, bool], optim.Optimizer] = _adamw
    clip: float | None = None

    @property
    def can_fuse(self) -> bool:
        return self.optimizer is _adamw

    def batches(self, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [self.draw(self.samples, generator) for _ in range(_BATCHES)]


class Steps(Protocol):
    """What a step needs of an optimizer."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def make_step(job: Job, model: nn.Module, optimizer: Steps, batches: list[Batch]) -> Callable[[], None]:
    """One step of the plain loop over the batches, again and again."""
    endless = cycle(batches)

    def step() -> None:
        inputs, target = next(endless)
        loss = job.loss(model(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        if job.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()

    return step


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip


def _mlp_10m() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


def _draw_pixels(samples: int, generator: torch.Generator) -> Batch:
    return (torch.randn(samples, 784, generator=generator),), _classes(samples, 10, generator)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _draw_images(samples: int, generator: torch.Generator) -> Batch:
    return (torch.randn(samples, 1, 28, 28, generator=generator),), _classes(samples, 10, generator)


_ITEMS, _MEAN_BAG = 1_000_000, 20


class _Recommender(nn.Module):
    """The mean of a user's items' vectors, and a small head."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(_ITEMS, 16, mode="mean", sparse=sparse)
        self.head = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        score: Tensor = self.head(self.items(ids, offsets))
        return score.squeeze(1)


def _draw_bags(samples: int, generator: torch.Generator) -> Batch:
    lengths = torch.randint(_MEAN_BAG // 2, _MEAN_BAG * 3 // 2 + 1, (samples,), generator=generator)
    ids = torch.randint(_ITEMS, (int(lengths.sum()),), generator=generator)
    return (ids, lengths.cumsum(0) - lengths), _classes(samples, 2, generator).float()


def _draw_clicks(samples: int, generator: torch.Generator) -> Batch:
    """As the other bags, but the k-th item comes with probability 1 / k, up to a factor (Zipf), as goods are bought."""
    (ids, offsets), target = _draw_bags(samples, generator)
    place = torch.exp(torch.rand(len(ids), generator=generator) * math.log(_ITEMS)).long() - 1
    return (place * 7_654_321 % _ITEMS, offsets), target  # who comes often lies anywhere


_VOCABULARY, _LENGTH, _WIDTH, _HEADS, _LAYERS = 256, 128, 256, 8, 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(samples, length, 3, _HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        x = x + self.mlp(self.before_mlp(x))
        return x


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(_VOCABULARY, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight
        logits: Tensor = self.head(self.blocks(x))
        return logits.flatten(0, 1)


def _draw_text(samples: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(_VOCABULARY, (samples, _LENGTH + 1), generator=generator)
    return (ids[:, :-1].contiguous(),), ids[:, 1:].flatten()


def _classes(samples: int, classes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(classes, (samples,), generator=generator)


JOBS = {
    job.name: job
    for job in (
        Job("mlp", "MLP 784-512-512-10, batch 64", 64, _mlp, _draw_pixels),
        Job("mlp10m", "MLP 784-2048-2048-2048-10, batch 64", 64, _mlp_10m, _draw_pixels),
        Job("cnn", "CNN of two convolutions on 28x28, batch 64", 64, _cnn, _draw_images),
        Job(
            "recommender",
            "EmbeddingBag 1M x 16, dense gradients, about 20 ids a sample, batch 256",
            256,
            _Recommender,
            _draw_bags,
            F.binary_cross_entropy_with_logits,
        ),
        Job(
            "sparse",
            "the same with sparse gradients, SGD",
            256,
            lambda: _Recommender(sparse=True),
            _draw_bags,
            F.binary_cross_entropy_with_logits,
            _sgd,
        ),
        Job(
            "clicks",
            "the same, few items in most of the bags (Zipf)",
            256,
            lambda: _Recommender(sparse=True),
            _draw_clicks,
            F.binary_cross_entropy_with_logits,
            _sgd,
        ),
        Job("gpt", "GPT of 4 layers, width 256, 128 tokens, batch 8", 8, _Gpt, _draw_text),
    )
}


def find_job(name: str) -> Job:
    """One of JOBS; ``gpt@0.5`` is it with gradients clipped to that norm."""
    plain, _, clip = name.partition("@")
    return replace(JOBS[plain], name=name, clip=float(clip)) if clip else JOBS[plain]
