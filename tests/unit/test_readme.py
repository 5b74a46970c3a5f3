"""The documentation agrees with itself, in both languages, and with what it describes."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest

from paceline.cli.options import OPTIONS, SWITCHES, flag
from tests import readme

ROOT = readme.ROOT
ENGLISH = readme.ENGLISH.read_text(encoding="utf-8")
CHINESE = readme.CHINESE.read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
DOCUMENTS = [readme.ENGLISH, readme.CHINESE, ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]

HAN = re.compile(r"[\u4e00-\u9fff]")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`([\w./-]+(?:\.py|/))`")


def looked_for(text: str) -> list[list[str]]:
    """The rows of the table "if you look for ... run ..."."""
    (table,) = [rows for rows in readme.tables(text) if rows[0][-1] in ("Run", "命令")]
    return table[1:]


def test_both_languages_list_the_same_commands() -> None:
    assert readme.commands(ENGLISH)
    assert readme.commands(CHINESE) == readme.commands(ENGLISH)


@BOTH
def test_every_row_has_a_term_in_either_language_and_one_command(text: str) -> None:
    commands = readme.commands(text)
    for english, chinese, run in looked_for(text):
        if text is CHINESE:
            english, chinese = chinese, english
        assert HAN.search(chinese), chinese
        assert re.search(r"[a-z]{3}", english), english
        assert run.strip("`") in commands


def test_both_languages_show_the_same_code() -> None:
    english, chinese = readme.files(ENGLISH), readme.files(CHINESE)
    assert english.keys() == chinese.keys()
    for name, code in english.items():
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(chinese[name])), name
    assert readme.blocks(ENGLISH, "console") == readme.blocks(CHINESE, "console")


def test_three_lines_make_a_script_distributed() -> None:
    plain, distributed = (readme.files(ENGLISH)[name].splitlines() for name in ("plain.py", "train.py"))
    changed = [line for line in difflib.ndiff(plain, distributed) if line[0] in "+-"]
    assert changed == [
        "+ import paceline",
        "+ run = paceline.init()",
        "+ model, optimizer, loader = run.wrap(model, optimizer, loader)",
    ]


@BOTH
def test_the_options_in_the_table_are_those_of_the_command_line(text: str) -> None:
    (table,) = [rows for rows in readme.tables(text) if rows[1][0] == "`--workers N`"]
    told = {option for row in table for option in re.findall(r"--[a-z-]+", row[0])}
    assert told == {*map(flag, (*OPTIONS, *SWITCHES)), "--config"}


@BOTH
def test_make_has_the_targets_that_are_named(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`make (\w+)`|^\$ make (\w+)", text, re.MULTILINE))
    assert {first or second for first, second in named} >= {"demo", "test"}
    for first, second in named:
        assert re.search(rf"^{first or second}:", makefile, re.MULTILINE)


@BOTH
def test_the_figures_have_a_marked_place(text: str) -> None:
    assert re.findall(r"<!-- bench:(\w+) -->", text) == ["start", "end"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_linked_and_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert "://" in target or (document.parent / target).exists(), target
    if document in (readme.ENGLISH, readme.CHINESE):
        return  # they name files of the user's and of runs
    for name in PATH.findall(text):
        assert (ROOT / name).exists() or (ROOT / "paceline" / name).exists(), name


def test_the_map_has_every_folder_of_the_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for init in (ROOT / "paceline").glob("*/__init__.py"):
        assert f"`{init.parent.name}/" in text, init.parent.name


def test_the_diff_in_the_docs_is_that_of_the_two_examples() -> None:
    ours, theirs = ("examples/mlp.py", "examples/mlp_ddp.py")
    before, after = ((ROOT / name).read_text(encoding="utf-8").splitlines() for name in (theirs, ours))
    now = "\n".join(difflib.unified_diff(before, after, theirs, ours, n=1, lineterm="")) + "\n"
    shown = readme.blocks((ROOT / "docs" / "ddp.md").read_text(encoding="utf-8"), "diff")
    assert shown == [now], f"the diff in docs/ddp.md should now be:\n{now}"
