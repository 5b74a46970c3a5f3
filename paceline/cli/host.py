"""What the header line says of this machine, found without torch."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.cli.figures import plural


def machine() -> str:
    """``2 cores, no GPU``: the cores this process may use, the GPUs whose driver is loaded."""
    gpus = _gpus()
    return f"{plural(cores(), 'core')}, {plural(gpus, 'GPU') if gpus else 'no GPU'}"


def cores() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    """NVIDIA's driver lists its cards; AMD's lists compute nodes, of which processors have no SIMD units."""
    nvidia = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    amd = sum(_simds(node) > 0 for node in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties"))
    return nvidia + amd


def _simds(node: Path) -> int:
    try:
        values = dict(line.split(" ", 1) for line in node.read_text().splitlines() if " " in line)
        return int(values.get("simd_count", 0))
    except (OSError, ValueError):
        return 0
