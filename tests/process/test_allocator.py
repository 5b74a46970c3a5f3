"""The allocator's settings reach workers, and only where the user has made none."""

from __future__ import annotations

import pytest

from paceline.engine import allocator
from tests.process.runner import Runner

FAULTS = """
import os, resource, torch, paceline

run = paceline.init()
torch.zeros(2_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2_000_000)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print("kept" if faults < 2_000 else "given back", os.environ.get("GLIBC_TUNABLES"), flush=True)
"""


@pytest.mark.parametrize(
    "chosen",
    [{"LD_PRELOAD": "libjemalloc.so"}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}],
)
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    assert allocator.settings({"PATH": "/bin"} | chosen) == {}
    environment = dict(chosen)
    allocator.forget(environment)
    assert environment == chosen


def test_what_was_set_is_forgotten() -> None:
    environment = {"PATH": "/bin"}
    environment |= allocator.settings(environment)
    assert len(environment) == 2
    allocator.forget(environment)
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("mine", "says"),
    [({}, "kept None"), pytest.param({"MALLOC_MMAP_THRESHOLD_": "65536"}, "given back None", marks=pytest.mark.long)],
)
def test_a_worker_keeps_what_a_step_frees(mine: dict[str, str], says: str, runner: Runner) -> None:
    """Twenty tensors of 8 MB, one after the other: 2,000 pages each where the memory is the kernel's in between."""
    runner.write("faults.py", FAULTS)
    ended = runner.start("-m", "paceline", "run", "--workers", "2", "faults.py", **mine).end()
    assert ended.code == 0, ended.err
    assert says in ended.out
