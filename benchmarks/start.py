"""How long until something happens: the help text, and a run of an empty loop, next to torch's own import.

    python -m benchmarks.start --rounds 5

The commands take turns, so that what disturbs the machine falls on all alike. Seconds: median (lowest to highest).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

_EMPTY = """
import torch, paceline

run = paceline.init()
model = torch.nn.Linear(1, 1)
model, optimizer, loader = run.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.zeros(1, 1)] * 4)
for batch in loader:
    model(batch).sum().backward()
    optimizer.step()
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="times each command is run (default 5)")
    rounds = parser.parse_args(argv).rounds
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with tempfile.TemporaryDirectory(prefix="start-") as directory:
        script = Path(directory) / "empty.py"
        script.write_text(_EMPTY)
        paceline = [sys.executable, "-m", "paceline"]
        commands = {
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "paceline --help": [*paceline, "--help"],
            "python empty.py": [sys.executable, str(script)],
            "paceline run --workers 2 empty.py": [*paceline, "run", "--workers", "2", str(script)],
            "paceline run --workers 8 empty.py": [*paceline, "run", "--workers", "8", str(script)],
        }
        took_s: dict[str, list[float]] = {told: [] for told in commands}
        for _ in range(rounds):
            for told, command in commands.items():
                begun = time.monotonic()
                subprocess.run(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, check=True)
                took_s[told].append(time.monotonic() - begun)
    for told, times in took_s.items():
        print(f"{told:36}{median(times):6.2f}   ({min(times):.2f} to {max(times):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
