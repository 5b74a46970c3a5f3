"""The READMEs as tests read them: the commands that they tell people to type, the files that they show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_IN_TABLE = re.compile(r"^\|.*$", re.MULTILINE)
_COMMAND = re.compile(r"`((?:paceline|python|torchrun) [^`]+)`")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of this language, in order."""
    return [body for kind, body in _FENCE.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    """What CI runs: each line of a `sh` block, and each cell of a table that is a command, once, in order."""
    found: list[tuple[int, str]] = []
    for fence in _FENCE.finditer(text):
        if fence[1] == "sh":
            found += [(fence.start(), line) for line in fence[2].splitlines()]
    for row in _IN_TABLE.finditer(_without_code(text)):
        found += [(row.start(), cell) for cell in map(_only_command, row[0].split("|")) if cell]
    return list(dict.fromkeys(command for _, command in sorted(found, key=lambda pair: pair[0])))


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of stripped cells; the first row is the header, the line under it is left out."""
    found: list[list[list[str]]] = []
    last = ""
    for line in _without_code(text).splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                found.append([])
            if not line.startswith("|---"):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        last = line
    return found


def files(text: str) -> dict[str, str]:
    """The files shown: a `python` block whose first line is ``# name.py``, and both sides of the `diff`."""
    shown = {body.split("\n", 1)[0].removeprefix("# "): body for body in blocks(text, "python")}
    (diff,) = blocks(text, "diff")
    old, new, *lines = diff.splitlines()
    shown[old.removeprefix("--- ")] = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    shown[new.removeprefix("+++ ")] = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    return shown


def _only_command(cell: str) -> str | None:
    found = _COMMAND.fullmatch(cell.strip())
    return found[1] if found else None


def _without_code(text: str) -> str:
    """The text with fenced blocks blanked out; everything else stays where it is."""
    return _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)
