"""Claims about where the script begins in a command line, and whose the options behind it are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.fence import VALUED, brought_forward, fenced, misspelt

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


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("--pce async", ("--pce", "--pace")),
        ("--pacee=async", ("--pacee", "--pace")),
        ("--lr 1 --wokers 4", ("--wokers", "--workers")),
        ("--min_workers 2", ("--min_workers", "--min-workers")),
        ("--chekpoint-every 5", ("--chekpoint-every", "--checkpoint-every")),
        ("--until-los 0.1", ("--until-los", "--until-loss")),
        ("--engnie ray", ("--engnie", "--engine")),
        # What many scripts have, what is short, what is plainly something else, what the script's text names.
        ("--epoch 3 --step 4 --ports 1", None),
        ("--page 3 --flip --deep --lr 1 --p 2 -pce 3", None),
        ("--num-workers 4 --batch-size 8 --log-dir a --data-dir b --name pce", None),
        ("pce", None),
        ("--space 3 --worker_s 2 --restart", None),
        ("", None),
    ],
)
def test_what_is_misspelt_behind_the_script_is_found(typed: str, found: tuple[str, str] | None) -> None:
    script = """
parser.add_argument("--space")
parser.add_argument("--worker-s")
def main(restart: bool): ...
"""
    assert misspelt(typed.split(), script) == found
