"""Has a backward pass added to gradients?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def gradient_marks(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
    """Something else whenever a backward pass has added to one of their gradients."""
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]
