"""Where paceline's part of a command line ends and the script's begins: a ``--`` stands there, typed or put there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from paceline.cli.options import OPTIONS, OPTIONS_OF_OURS_ALONE, SWITCHES, TRUTHS, flag

VALUED = {flag(option) for option in OPTIONS if option not in TRUTHS} | {"--config"}
BARE = {flag(option) for option in (*TRUTHS, *SWITCHES)}
EXPORTED = VALUED | {"--nodes", "--output", "--image", "--kind"}
_NEAR = 0.83  # a letter too few, too many or two changed about; not one for another in so short a word as "pace"
TRAINING = (["run"], ["demo"])  # the commands that take a script's arguments and print a run as JSON


def fenced(tokens: list[str]) -> list[str]:
    """The tokens with ``--`` before the script or the demo's name: what follows is not ours to read."""
    if tokens[:1] not in (*TRAINING, ["export"]):
        return tokens
    is_export = tokens[0] == "export"
    at = 2 if is_export else 1
    while at < len(tokens):
        if tokens[at] == "--":
            return tokens
        if not tokens[at].startswith("-"):
            return [*tokens[:at], "--", *tokens[at:]]
        at += 2 if tokens[at] in (EXPORTED if is_export else VALUED) else 1
    return tokens


def brought_forward(tokens: list[str], source_of: Callable[[str], str]) -> list[str]:
    """The tokens of ``run`` or ``export`` with options of ours that follow the script put before it.

    They are taken for ours if nothing else follows, or nothing else before a ``--``, and the script's text, which
    ``source_of`` reads, names none of them.
    """
    takes = tokens[:1] in (["run"], ["export"])
    at = fenced(tokens).index("--") if takes and "--" in fenced(tokens) else len(tokens)
    if at >= len(tokens) or tokens[at] == "--":
        return tokens
    script, behind = tokens[at], tokens[at + 1 :]
    cut = behind.index("--") if "--" in behind else len(behind)
    names = _names(behind[:cut], EXPORTED if tokens[0] == "export" else VALUED)
    if not behind or names is None:
        return tokens
    source = source_of(script)
    if any(name in source for name in names):
        return tokens
    return [*tokens[:at], *behind[:cut], "--", script, *behind[cut + 1 :]]


def misspelt(args: Sequence[str], source: str) -> tuple[str, str] | None:
    """The first of a script's arguments that looks like an option of ours, of which the script's text, ``source``,
    knows nothing; and which it is like."""
    names = {flag(option)[2:]: flag(option) for option in OPTIONS_OF_OURS_ALONE}
    for arg in args:
        typed = arg.partition("=")[0]
        name = typed[2:].replace("_", "-")
        if not typed.startswith("--") or typed in names.values() or _is_named(name, source):
            continue
        if near := difflib.get_close_matches(name, names, n=1, cutoff=_NEAR):
            return typed, names[near[0]]
    return None


def _is_named(name: str, source: str) -> bool:
    """Also as the name of a variable, from which many a library makes an option."""
    return re.search(rf"\b{'[-_]'.join(map(re.escape, name.split('-')))}\b", source) is not None


def ours(tokens: list[str]) -> list[str]:
    """Those of the tokens that are not the script's."""
    tokens = fenced(tokens)
    return tokens[: tokens.index("--")] if "--" in tokens else tokens


def text_of(script: str) -> str:
    """The script's text, as far as it can be read."""
    try:
        return Path(script).read_text(errors="replace")
    except OSError:
        return ""


def _names(tokens: list[str], valued: set[str]) -> set[str] | None:
    """The options that these are, with their values; None if anything else is among them."""
    names, at = set(), 0
    while at < len(tokens):
        name, given, _ = tokens[at].partition("=")
        if name not in valued | BARE:
            return None
        names.add(name)
        at += 2 if name in valued and not given else 1
    return names
