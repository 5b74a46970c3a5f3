"""What goes wrong in a script, a command line or a call is said in one block, with its exit code."""

from __future__ import annotations

import re

import pytest

from tests.process.runner import Ended, Runner

# A small training script with a place for something wrong before its wrap, in its wrap, and in its loop.
SCRIPT = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline


class OwnSGD(torch.optim.SGD):
    pass


run = paceline.init()
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4)
{before}
model, optimizer, loader = run.wrap(model, optimizer, loader)
for step, (x, *_) in enumerate(loader):
    {inside}
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
{after}
"""


def script(*, before: str = "", inside: str = "", after: str = "") -> str:
    return SCRIPT.format(before=before, inside=inside or "pass", after=after)


def failed(ended: Ended, code: int) -> str:
    """The error block, once all places agree that the run failed with this code."""
    assert ended.code == code, ended.err
    assert ended.answer["status"] == "failed"
    assert ended.answer["exit_code"] == code
    assert ended.error.startswith(ended.answer["error"])
    assert (ended.summary["status"], ended.summary["exit_code"]) == ("failed", code)
    assert ended.info["status"] == "failed"
    return ended.error


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_the_users_traceback_comes_first_and_is_the_users_alone(rank: int, runner: Runner) -> None:
    wrong = f"if run.rank == {rank} and step == 2: check(x)"
    text = script(before="def check(x):\n    raise ValueError(f'{len(x)} samples, \\u00e4h')", inside=wrong)
    ended = runner.run(text)
    error = failed(ended, 1)
    assert error == f"worker {rank} raised ValueError: 4 samples, \u00e4h\n"

    traceback, _, _ = ended.err[ended.err.index("Traceback") :].partition("\n\nerror: ")
    lines = traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert re.fullmatch(r'  File ".*train\.py", line \d+, in <module>', lines[1])
    assert lines[-1] == "ValueError: 4 samples, \u00e4h"
    assert "paceline/" not in traceback
    assert "runpy" not in traceback
    assert ended.err.count("Traceback") == 1
    assert traceback in ended.log(rank)
    assert "Traceback" not in ended.log(1 - rank)


def test_a_script_that_is_no_python_is_told_as_python_tells_it(runner: Runner) -> None:
    ended = runner.run("import paceline\n\nrun = paceline.init(\n")
    assert "SyntaxError: '(' was never closed" in failed(ended, 1)
    traceback = ended.err[: ended.err.index("error: ")]
    assert re.search(r'^  File ".*train\.py", line 3$', traceback, re.MULTILINE)
    assert "paceline/engine" not in traceback


@pytest.mark.parametrize(
    ("value", "shown"), [("'the disk is full'", "'the disk is full'"), pytest.param("3", "3", marks=pytest.mark.long)]
)
def test_a_script_that_exits_with_an_error_fails_the_run(value: str, shown: str, runner: Runner) -> None:
    ended = runner.run(script(after=f"if run.is_main: sys.exit({value})"))
    assert failed(ended, 1) == f"worker 0: the script exited with {shown}\n"
    assert "Traceback" not in ended.err
    if value != shown.strip("'"):
        assert "the disk is full" in ended.out.splitlines()


UNSUITABLE = {
    "a batch without a count": (
        {"before": "loader = [[{'n': 1}]] * 8"},
        ["cannot count the samples in a batch of type list", "fix: ", "count=function"],
    ),
    "a model that was changed after wrap": (
        {"inside": "model.double(), model.float()"},
        ["parameter weight was given other memory after run.wrap", "fix: ", "before run.wrap"],
    ),
    "models that differ": (
        {"before": "model = nn.Linear(4, 3 + run.rank)\noptimizer = torch.optim.SGD(model.parameters())"},
        ["the same model: weight [4, 4] float32 in group 0 on worker 1, weight [3, 4]", "on worker 0", "fix: "],
    ),
    "a wrap of worker 0 alone": (
        {"before": "if not run.is_main: sys.exit()"},
        ["worker 1 ended without the run.wrap that worker 0 waits in", "run.is_main"],
    ),
    "LBFGS": (
        {"before": "optimizer = torch.optim.LBFGS(model.parameters())"},
        ["LBFGS evaluates the loss several times", "fix: "],
    ),
}


TOLD_BY_ONE = {"a batch without a count", "a model that was changed after wrap", "LBFGS"}  # no other process has a part


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.long) if what in TOLD_BY_ONE else what for what in UNSUITABLE]
)
def test_what_cannot_be_trained_is_refused_with_a_reason(what: str, runner: Runner) -> None:
    parts, sentences = UNSUITABLE[what]
    ended = runner.run(script(**parts))
    error = failed(ended, 3)
    for sentence in sentences:
        assert sentence in error
    assert "Traceback" not in ended.err


def test_a_model_larger_than_the_machine_is_refused_with_both_sizes(runner: Runner) -> None:
    # Of the largest values there are: the table has an entry for each so many of them.
    huge = "model.scale = nn.Parameter(torch.zeros(1, dtype=torch.complex128).expand(2**34))"
    ended = runner.run(script(before=f"{huge}\noptimizer.add_param_group({{'params': [model.scale]}})"))
    error = failed(ended, 4)
    found = re.search(r"SGD over 17179869199 parameters needs ([\d,.]+) MB .* has ([\d,.]+) MB left", error)
    assert found, error
    needed, left = (float(number.replace(",", "")) for number in found.groups())
    assert needed > 16e-6 * 2**34 * 3  # the values, and a gradient of each worker
    assert 0 < left < needed
    assert "fix: " in error


def test_a_server_cannot_step_an_optimizer_of_the_scripts_own(runner: Runner) -> None:
    own = script(before="optimizer = OwnSGD(model.parameters(), lr=0.1)")
    error = failed(runner.run(own, "--servers", "1"), 3)
    assert "optimizer OwnSGD is defined where a server cannot import it" in error
    assert "fix:   move the class to a module beside the script, or use --servers 0" in error


def test_a_module_beside_the_script_is_found_by_servers(runner: Runner) -> None:
    runner.write("own.py", "import torch\n\n\nclass OwnSGD(torch.optim.SGD):\n    pass\n")
    ended = runner.run(
        script(before="import own\noptimizer = own.OwnSGD(model.parameters(), lr=0.1)"), "--servers", "1"
    )
    assert ended.code == 0, ended.err
    assert ended.answer["steps"] == 5


MISUSES = {
    "an unknown pace": (["--pace", "bounded:", "train.py"], "pace 'bounded:' has '' where a whole number belongs"),
    "a quorum of nobody knows how many": (
        ["--pace", "quorum", "train.py"],
        "say how many pushes close a round: quorum:3",
    ),
    "a quorum of more than there are": (["--pace", "quorum:3", "train.py"], "there are 2 workers"),
    "damping at a pace without staleness": (["--staleness-damping", "train.py"], "is for paces bounded and async"),
    "a misspelt pace": (["--pace", "synk", "train.py"], "did you mean 'sync'?"),
    "no workers": (["--workers", "0", "train.py"], "workers is 0; it must be 1 or more"),
    "a word for a number": (["--workers", "two", "train.py"], "--workers is 'two'; it must be a whole number"),
    "an unknown flag": (["--wrokers", "2", "train.py"], "did you mean '--workers'?"),
    "a missing script": (["trian.py"], "script 'trian.py' does not exist\nfix:   did you mean 'train.py'?"),
    "no script": ([], "no script is given"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_a_wrong_command_line_starts_nothing(what: str, runner: Runner) -> None:
    runner.write("train.py", script())
    arguments, sentence = MISUSES[what]
    ended = runner.paceline("run", "--json", *arguments)
    assert ended.code == 2
    assert sentence in ended.error
    assert "Traceback" not in ended.err
    assert (ended.answer["status"], ended.answer["exit_code"]) == ("failed", 2)
    assert not (runner.folder / "runs").exists()


def test_launch_without_a_main_guard_is_named(runner: Runner) -> None:
    path = runner.write("main.py", "import paceline\n\n\ndef work(rank):\n    pass\n\n\npaceline.launch(work)\n")
    ended = runner.python(str(path))
    assert ended.code == 1
    assert "UsageError: launch of work was reached inside a worker" in ended.err
    assert "if __name__ == '__main__':" in ended.err


def test_launch_names_what_cannot_be_sent_to_workers(runner: Runner) -> None:
    lines = "def work(*things):\n    pass\n\n\nif __name__ == '__main__':\n    import paceline\n\n    paceline.launch"
    for call in ("(work, (lambda: 1,))", "(lambda rank: 1)"):
        ended = runner.python(str(runner.write("main.py", f"{lines}{call}\n")))
        assert ended.code == 1
        name = "work" if call.startswith("(work") else "<lambda>"
        assert f"ConfigError: {name} and its arguments cannot be sent to workers: " in ended.err
        assert "<lambda>" in ended.err
        assert "fix:   define functions and classes at the top of a module" in ended.err
    ended = runner.python("-c", "import paceline\ndef work(rank): pass\npaceline.launch(work)")
    assert "ConfigError: work is defined in an interactive session, where workers cannot import it" in ended.err
    assert not (runner.folder / "runs").exists()


# A process may have files of so many bytes (which shared memory is), or so much address space beyond what it has.
LIMITED_FILES = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
sys.argv = ["paceline", "run", "--json", "train.py"]
runpy.run_module("paceline", run_name="__main__")
"""
LIMITED_SPACE = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
"""


def test_shared_memory_that_a_limit_forbids_ends_the_run_with_a_sentence(runner: Runner) -> None:
    runner.write("train.py", script().replace("nn.Linear(4, 3)", "nn.Linear(4, 100_000)"))
    ended = runner.python("-c", LIMITED_FILES)
    assert ended.code == 4, ended.err
    assert "SGD over 500000 parameters needs " in ended.error
    assert " of shared memory, which could not be reserved: File too large" in ended.error
    assert "why:   a memory limit of this container or user" in ended.error
    assert "fix:   raise the limit, or use fewer workers or a smaller model" in ended.error
    assert (ended.answer["status"], ended.answer["exit_code"]) == ("failed", 4)


def test_shared_memory_that_a_worker_cannot_map_ends_the_run_with_a_sentence(runner: Runner) -> None:
    large = script(before=LIMITED_SPACE).replace("nn.Linear(4, 3)", "nn.Linear(4, 3_000_000)")
    ended = runner.run(large)
    assert ended.code == 4, ended.err
    assert " of shared memory could not be mapped: Cannot allocate memory" in ended.error
    assert "ulimit -v" in ended.error
    assert (ended.answer["status"], ended.answer["exit_code"]) == ("failed", 4)
