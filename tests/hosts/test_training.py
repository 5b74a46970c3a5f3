"""Claims about a run across two hosts, which are network namespaces here."""

from __future__ import annotations

import json
import os
import struct

import pytest

from paceline.transport.keys import new_job_key
from tests.engines.test_torchrun import COUNT, TRAIN
from tests.hosts.namespaces import CAPTURE, Host
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]
MASTER_PORT = "29511"
SECRET = 1234.56789

# Every gradient and every parameter is one known number, over and over.
KNOWN = f"""
import torch
import paceline

run = paceline.init()
weight = torch.nn.Parameter(torch.full((512,), {SECRET}, dtype=torch.float64))
optimizer = run.wrap(torch.optim.SGD([weight], lr=1.0))
for step in range(3):
    weight.grad = torch.full_like(weight, {SECRET})
    optimizer.step()
    print("stepped", flush=True)
"""

# Worker 1's host is cut off in the midst of it: it waits for what the test writes to a pipe.
PATIENT = """
from counting import job, mark

import paceline

run = paceline.init(min_workers=1, restarts=0, pace="bounded:1")
counts, optimizer, loader = job(64)
optimizer, loader = run.wrap(optimizer, loader)
waits = run.rank == 1
for epoch in range(3):
    for (numbers,) in loader:
        mark(counts, numbers)
        optimizer.step()
        print("stepped", flush=True)
        if waits:
            open("cut").read()
            waits = False
if run.is_main:
    assert counts.detach().tolist() == [3.0] * 64
    print("all counted", flush=True)
"""


def start(
    runner: Runner, hosts: tuple[Host, Host], script: str, *, secure: bool = True, **variables: str
) -> list[Running]:
    """One worker on each host."""
    if secure:
        new_job_key(runner.folder / "job.key")
        variables["PACELINE_JOB_KEY_FILE"] = "job.key"
    else:
        variables["PACELINE_INSECURE"] = "1"
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": MASTER_PORT}
    return [
        runner.start_in(host.inside, script, RANK=str(rank), **place, **variables) for rank, host in enumerate(hosts)
    ]


def test_torchrun_on_two_hosts_is_one_process_on_the_whole_batch(runner: Runner, hosts: tuple[Host, Host]) -> None:
    runner.write("train.py", TRAIN)
    new_job_key(runner.folder / "job.key")
    both = [
        runner.start_in(
            host.inside,
            "-m",
            "torch.distributed.run",
            *("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "2"),
            *("--master-addr", hosts[0].address, "--master-port", MASTER_PORT),
            *("train.py", "four.json"),
            PACELINE_JOB_KEY_FILE="job.key",
        )
        for rank, host in enumerate(hosts)
    ]
    second, first = both[1].end(), both[0].end()
    assert (first.code, second.code) == (0, 0), first.err + second.err
    runner.python("train.py", "one.json")
    four, one = (json.loads((runner.folder / name).read_text()) for name in ("four.json", "one.json"))
    for a, b in zip(four, one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-12)
    assert (first.summary["status"], first.summary["workers"]) == ("done", 4)


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "insecure"])
def test_what_travels_can_be_read_on_the_wire_only_where_that_was_asked_for(
    runner: Runner, hosts: tuple[Host, Host], secure: bool
) -> None:
    runner.write("known.py", KNOWN)
    wire = runner.start_in(hosts[1].inside, "-c", CAPTURE, hosts[1].interface, "wire.bin")
    wire.until("listens")
    first, second = start(runner, hosts, "known.py", secure=secure)
    theirs, ended = second.end(), first.end()
    wire.close()
    assert (ended.code, theirs.code) == (0, 0), ended.err + theirs.err
    seen = (runner.folder / "wire.bin").read_bytes()
    assert len(seen) > 4 * 512 * 8  # three gradients went over it, and as many parameters
    assert (struct.pack("<d", SECRET) * 4 in seen) is not secure
    assert ("neither encrypted nor authenticated" in ended.err) is not secure


def test_a_host_that_is_cut_off_is_left_behind_in_words(runner: Runner, hosts: tuple[Host, Host]) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("patient.py", PATIENT)
    os.mkfifo(runner.folder / "cut")
    first, second = start(runner, hosts, "patient.py")
    second.until("stepped")
    hosts[1].cut()
    runner.write("cut", "")
    ended, theirs = first.end(), second.end()
    assert ended.code == 0, ended.err
    assert "all counted" in ended.out
    assert "worker 1 is lost: no connection to worker of host 1 for 5 s; the other goes on without it" in ended.out
    assert theirs.code == 75
    assert "paceline: worker 1 ends: home is lost" in theirs.err


def test_without_a_key_several_hosts_do_not_meet(runner: Runner) -> None:
    runner.write("counting.py", COUNTING)
    runner.write("count.py", COUNT)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": MASTER_PORT}
    ended = runner.python("count.py", RANK="0", **place)
    assert ended.code == 1
    assert "workers on several hosts need a job key" in ended.err
