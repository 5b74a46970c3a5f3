"""Claims about where the script begins in a command line, and whose the options behind it are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.fence import VALUED, brought_forward, fenced

options = st.sampled_from([["--json"], ["--workers", "4"], ["--workers=4"], ["--until-loss", "-1"], ["--bad"]])


@given(before=st.lists(options), script=st.sampled_from(["a.py", "4", "-/x"[1:]]), after=st.lists(st.text()))
def test_the_fence_stands_before_the_script(before: list[list[str]], script: str, after: list[str]) -> None:
    ours = [token for tokens in before for token in tokens]
    assert fenced(["run", *ours, script, *after]) == ["run", *ours, "--", script, *after]


def test_a_fence_that_was_typed_stays_and_other_commands_have_none() -> None:
    assert fenced(["run", "--json", "--", "-odd.py"]) == ["run", "--json", "--", "-odd.py"]
    assert fenced(["run", "--help"]) == ["run", "--help"]
    assert fenced(["runs", "show", "a"]) == ["runs", "show", "a"]
    assert {"--workers", "--until-loss", "--run-dir", "--config"} < VALUED
    assert fenced(["run", "--staleness-damping", "train.py"]) == ["run", "--staleness-damping", "--", "train.py"]


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("a.py --workers 4 --pace=async --json", "--workers 4 --pace=async --json -- a.py"),
        ("--seed 3 a.py --workers 4 -- --lr 1 --seed 2", "--seed 3 --workers 4 -- a.py --lr 1 --seed 2"),
        ("a.py -- --workers 4", "-- a.py --workers 4"),
        ("a.py --staleness-damping", "--staleness-damping -- a.py"),
        ("a.py --workers 4 --lr 1", "-- a.py --workers 4 --lr 1"),
        ("a.py --workers 4 data", "-- a.py --workers 4 data"),
        ("a.py --lr 1 -- --workers 4", "-- a.py --lr 1 -- --workers 4"),
        ("reads_seed.py --workers 4 --seed 1", "-- reads_seed.py --workers 4 --seed 1"),
        ("reads_seed.py --workers 4 -- --seed 1", "--workers 4 -- reads_seed.py --seed 1"),
        ("-- a.py --workers 4", "-- a.py --workers 4"),
        ("--workers 4 a.py", "--workers 4 -- a.py"),
    ],
)
def test_options_may_follow_the_script_where_nothing_else_does(typed: str, understood: str) -> None:
    texts = {"a.py": "", "reads_seed.py": 'parser.add_argument("--seed")'}
    tokens = brought_forward(["run", *typed.split()], texts.__getitem__)
    assert fenced(tokens) == ["run", *understood.split()]
