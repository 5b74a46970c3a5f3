"""Claims about the shape of the package: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "paceline"

LAYERS = [
    {"errors", "events", "config", "config_file"},
    {"protocol"},
    {"params", "data", "codecs"},
    {"transport"},
    {"layouts"},
    {"engine"},
    {"run"},
    {"cli"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
BELOW = {unit: {lower for lower, at in LEVEL.items() if at < level} for unit, level in LEVEL.items()}
MAY_IMPORT = BELOW | dict.fromkeys(LAYERS[0], LAYERS[0])  # the files of layer 0 share a folder
MAY_IMPORT |= {"report": LAYERS[0], "planner": BELOW["layouts"]}
MAY_IMPORT["cli"] = BELOW["cli"] | {"report", "planner", "paceline"}

PURE = {"torch", "socket", "threading", "time", "os", "mmap", "numpy"}  # what protocol/ does without
RESERVED = {"cyclopts": {"cli"}, "rich": {"cli", "report"}, "matplotlib": {"report"}}


def imported(path: Path, root: Path) -> set[str]:
    """Every module or name imported anywhere in the file, as an absolute dotted path."""
    folder = ["paceline", *path.relative_to(root).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def violations(root: Path) -> list[str]:
    """One line for each import that breaks the layering in the package at `root`."""
    broken = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if where.as_posix() in {"__init__.py", "__main__.py"}:
            continue
        unit = where.parts[0].removesuffix(".py")
        if unit not in MAY_IMPORT:
            broken.append(f"{where} belongs to no layer")
            continue
        for name in sorted(imported(path, root) - {"paceline.__version__"}):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "paceline":
                # A name that is no unit is one that the package itself re-exports: its public face.
                target = target if target in MAY_IMPORT else "paceline"
                allowed = target == unit or target in MAY_IMPORT[unit]
            else:
                allowed = unit in RESERVED.get(top, {unit}) and not (unit == "protocol" and top in PURE)
            if not allowed:
                broken.append(f"{where} imports {name}")
    return broken


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    return root


def test_package_keeps_its_layers() -> None:
    assert PACKAGE.is_dir()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("protocol/gate.py", "from paceline.transport.slots import Slot", "paceline.transport.slots.Slot"),
        ("protocol/gate.py", "from ..engine import worker", "paceline.engine.worker"),
        ("protocol/deep/gate.py", "from ...engine import worker", "paceline.engine.worker"),
        ("data/ledger.py", "import paceline.codecs.sign", "paceline.codecs.sign"),
        ("config.py", "from paceline import params", "paceline.params"),
        ("engine/worker/worker.py", "from paceline import Trainer", "paceline.Trainer"),
        ("engine/worker/worker.py", "import paceline", "paceline"),
        ("run/context.py", "from paceline.report import plots", "paceline.report.plots"),
        ("report/plots.py", "from paceline.params import Flat", "paceline.params.Flat"),
        ("planner/cost.py", "from paceline.layouts import ddp", "paceline.layouts.ddp"),
        ("protocol/gate.py", "def now():\n    import time\n", "time"),
        ("protocol/gate.py", "import os.path", "os.path"),
        ("run/context.py", "from rich.console import Console", "rich.console.Console"),
        ("cli/main.py", "import matplotlib.pyplot as plt", "matplotlib.pyplot"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, name: str) -> None:
    assert violations(plant(tmp_path, {file: source})) == [f"{file} imports {name}"]


def test_a_file_outside_the_layers_is_found(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, {"utils.py": ""})) == ["utils.py belongs to no layer"]


def test_legal_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from paceline.run import init",
        "__main__.py": "from paceline.cli.main import main",
        "config.py": "from paceline.errors import ConfigError",
        "protocol/shard.py": "from . import gate\nfrom .gate import allow\nfrom ..events import Step",
        "engine/worker/worker.py": "import time, torch\nfrom paceline import __version__, protocol",
        "report/plots.py": "import matplotlib\nimport rich\nfrom paceline.events import Step",
        "planner/cost.py": "from paceline.protocol import gate\nfrom paceline.transport import slots",
        "cli/main.py": "import cyclopts, rich\nfrom paceline.report import plots\nfrom paceline import run",
    }
    assert violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize("module", ["paceline", "paceline.cli.main"])
def test_import_leaves_torch_alone(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'matplotlib', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
