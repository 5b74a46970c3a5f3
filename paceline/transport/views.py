"""A tensor as the bytes that it lies in, for links: nothing is copied."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """``tensor`` (contiguous, on the CPU) as writable bytes; it stays alive as long as they do."""
    assert tensor.is_contiguous(), "only what lies in one piece has bytes to be sent"
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
