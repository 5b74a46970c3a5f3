"""A checkpoint's writer may be killed at any call, or its disk be full: the old one or the new one is there, whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.engine.checkpoint.checkpoints import Checkpoints
from tests.process.runner import ROOT, TIMEOUT_S

# What both ways of killing begin with. argv: how, a folder, the step to write.
WRITER = """
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.safetensors import Tensor

folder, step = Path(sys.argv[1]), int(sys.argv[2])


def write(directory, step, name):
    weight = Tensor("float32", (2, 64), name.encode() * 64)
    return Checkpoints(directory).write(step, {"model": {"weight": weight}, "optimizer": {}}, {"state": name})


def tries(name):
    "Folders name-1, name-2, ... with checkpoints of steps 1 and 2, until the writer in one is not killed."
    for number in itertools.count(1):
        directory = folder / f"{name}-{number:03}"
        shutil.copytree(folder / "base", directory)
        pid = os.fork()
        if not pid:
            yield number, directory
            write(directory, step, "new.....")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            assert status == 0, status
            break


(folder / "base").mkdir()
write(folder / "base", 1, "one.....")
write(folder / "base", 2, "two.....")
assert not {"torch", "numpy"} & set(sys.modules)
"""

# At its n-th call of a function of os. If that is a write, half is written; and fsync does nothing, for what it does
# shows only when the power fails.
AT_ITS_CALLS = """
calls = 0


def deadly(name, real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return None if name == "fsync" else real(*args, **kwargs)

    return call


for deadline, directory in tries("call"):
    for name in ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "listdir"):
        setattr(os, name, deadly(name, getattr(os, name)))
"""

# By strace, which counts for each process how often it has entered a system call, and kills it the LAST time. So that
# one strace will do, a process that is to die at its n-th makes LAST - n vain ones before.
LAST = 40
BY_STRACE = f"""
nowhere = os.open(os.devnull, os.O_WRONLY)
vain = {{
    "write": lambda: os.write(nowhere, b"vain"),
    "fsync": lambda: os.fsync(nowhere),
    "rename": lambda: os.rename("/nowhere/a", "/nowhere/b"),
    "unlink": lambda: os.unlink("nothing", dir_fd=nowhere),
}}
for name, call in vain.items():
    for number, _ in tries(name):
        assert number < {LAST}
        for _ in range({LAST} - number):
            with contextlib.suppress(OSError):
                call()
"""
CALLS = "write,fsync,?rename,?renameat,?renameat2,unlinkat"


def run(*command: str) -> str:
    """What the command writes; it must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def assert_old_or_new(folder: Path, step: int) -> set[str]:
    """That of every run in the folder; whether the old or the new was found in any, or both."""
    seen = set()
    for directory in folder.iterdir():
        store = Checkpoints(directory)
        loaded = store.load()
        name = loaded.documents["state"]
        assert loaded.warnings == []
        assert loaded.step == {"two.....": 2, "new.....": step}[name]
        assert bytes(loaded.tensors["model"]["weight"].data) == name.encode() * 64
        # What has a name is whole, and as many are there as before.
        visible = [store.load(path).documents["state"] for path in store.paths()]
        assert len(visible) >= 2
        assert visible[-1] == name
        seen.add(name)
        store.write(9, {}, {"state": "next"})
        assert sorted(os.listdir(store.directory)) == [loaded.path.name, "step-00000009"]
    return seen


def tried(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs"
    path.mkdir()
    return path


@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step"])
def test_killed_at_any_call_the_old_or_the_new_is_there(folder: Path, step: int) -> None:
    run(sys.executable, "-c", WRITER + AT_ITS_CALLS, str(folder), str(step))
    assert tried(folder, "call") > 40
    assert assert_old_or_new(folder, step) == {"two.....", "new....."}


@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step"])
def test_killed_by_the_kernel_at_any_write_fsync_and_rename_the_old_or_the_new_is_there(
    folder: Path, tmp_path: Path, step: int
) -> None:
    strace = strace_or_skip()
    injected = f"inject={CALLS}:signal=KILL:when={LAST}"
    script = [sys.executable, "-c", WRITER + BY_STRACE, str(folder), str(step)]
    run(strace, "-f", "-o", str(tmp_path / "trace"), "-e", f"trace={CALLS}", "-e", injected, *script)
    # A manifest, a document and two groups, of which one has data; the folder, and the one that it is in, twice; a name
    # given and a name taken; four files removed, and the folder by one call or another. The last was not killed.
    calls = {name: tried(folder, name) - 1 for name in ("write", "fsync", "rename", "unlink")}
    assert calls == {"write": 5, "fsync": 7, "rename": 2, "unlink": calls["unlink"]}
    assert calls["unlink"] in {4, 5}
    assert assert_old_or_new(folder, step) == {"two.....", "new....."}


def strace_or_skip() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed; these run where Debian's package strace is")
    probe = subprocess.run(
        [found, "-o", "/dev/null", "-e", "inject=fsync:signal=KILL:when=99", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()}")
    return found


# A disk of 1 MiB of its own, seen by nobody else and gone with the process. Answers what happened, as JSON.
FULL = """
import json
import os
import sys
from pathlib import Path

from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.safetensors import Tensor
from paceline.errors import HostError

folder, kind = Path(sys.argv[1]), sys.argv[2]
store = Checkpoints(folder)


def free():
    disk = os.statvfs(folder)
    return disk.f_bfree * disk.f_frsize


def write(step, size, documents=1):
    tensors = {"model": {"weight": Tensor("uint8", (size,), bytes(size))}}
    return store.write(step, tensors, {f"state-{number}": step for number in range(documents)})


write(1, 200_000)
write(2, 200_000)
before = free(), sorted(os.listdir(store.directory))
try:
    if kind == "too large":
        write(3, 2_000_000)
    else:  # its bytes fit, but not its pages: the disk is full in the middle
        write(3, free() - 16_000, documents=15)
except HostError as error:
    said = [error.what, error.why, error.fix]
after = free(), sorted(os.listdir(store.directory))
loaded = store.load()
answer = {"said": said, "before": before, "after": after, "step": loaded.step, "warnings": loaded.warnings}
del loaded
write(3, 200_000)
print(json.dumps(answer | {"then": store.load().step}))
"""


@pytest.mark.parametrize("kind", ["too large", "full in the middle"])
def test_a_full_disk_is_an_error_in_words_and_the_old_ones_stay(tmp_path: Path, kind: str) -> None:
    mounted = 'mount -t tmpfs -o size=1m,mode=700 paceline-test "$1"; '
    probe = ["unshare", "--mount", "sh", "-ec", mounted, "sh", str(tmp_path)]
    tried = subprocess.run(probe, capture_output=True, text=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip(f"a file system may not be mounted here: {tried.stderr.strip() if tried else 'no unshare'}")
    script = [sys.executable, "-c", FULL, str(tmp_path), kind]
    said: dict[str, Any] = json.loads(
        run("unshare", "--mount", "sh", "-ec", mounted + 'shift; exec "$@"', "sh", str(tmp_path), *script)
    )
    what, why, fix = said["said"]
    assert what.startswith(
        f"the checkpoint of step 3 could not be written to {tmp_path}/checkpoints: No space left on device; it needs "
    )
    needed, free = (float(word) for word in what.removesuffix(" MB are free").split("it needs ")[1].split(" MB, and "))
    assert abs(free - said["before"][0] / 1e6) < 0.1
    assert needed > 1.9 if kind == "too large" else needed <= free
    assert why == "the checkpoints before it are as they were"
    assert "free some space" in fix
    assert said["after"] == said["before"]
    assert (said["step"], said["warnings"], said["then"]) == (2, [], 3)
