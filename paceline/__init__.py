"""paceline trains one PyTorch model on many processes, at the pace they can keep.

Three lines make a plain training script distributed; see README.md. Names are resolved when first
used, so that ``import paceline`` costs nothing and ``paceline --help`` never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "init": "paceline.run.session",
    "Run": "paceline.run.session",
    "Store": "paceline.run.store",
    "launch": "paceline.run.launch",
    "Trainer": "paceline.run.trainer",
    "fit": "paceline.run.trainer",
    "Sync": "paceline.config",
    "Quorum": "paceline.config",
    "Bounded": "paceline.config",
    "Async": "paceline.config",
    "Local": "paceline.config",
    "Job": "paceline.config",
    "PacelineError": "paceline.errors",
}

__all__ = [
    "Async",
    "Bounded",
    "Job",
    "Local",
    "PacelineError",
    "Quorum",
    "Run",
    "Store",
    "Sync",
    "Trainer",
    "__version__",
    "fit",
    "init",
    "launch",
]

if TYPE_CHECKING:
    from paceline.config import Async, Bounded, Job, Local, Quorum, Sync
    from paceline.errors import PacelineError
    from paceline.run.launch import launch
    from paceline.run.session import Run, init
    from paceline.run.store import Store
    from paceline.run.trainer import Trainer, fit


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return list(__all__)
