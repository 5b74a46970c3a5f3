"""What the header line says of this machine, found without torch."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.cli.figures import plural


def machine() -> str:
    """``2 cores, no GPU``: the cores this process may use, the GPUs whose driver is loaded."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus()
    return f"{plural(cores, 'core')}, {plural(gpus, 'GPU') if gpus else 'no GPU'}"


def _gpus(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """NVIDIA's driver lists its cards in /proc; AMD's lists compute nodes, processors among them with 0 SIMDs."""
    nvidia = len(list(proc.glob("driver/nvidia/gpus/*")))
    amd = sum(_simds(node) > 0 for node in sys.glob("class/kfd/kfd/topology/nodes/*/properties"))
    return nvidia + amd


def _simds(node: Path) -> int:
    try:
        values = dict(line.split(" ", 1) for line in node.read_text().splitlines() if " " in line)
        return int(values.get("simd_count", 0))
    except (OSError, ValueError):
        return 0
