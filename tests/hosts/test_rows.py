"""Claims about embedding tables with sparse gradients on several hosts: rows go from each host to all others, and each
folds them. Real processes; the oracle is one process on the whole batch, and how often each sample counts."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest

from tests.hosts import test_owners
from tests.hosts.namespaces import Host
from tests.hosts.resuming import is_resumed_to_the_bit
from tests.hosts.test_folds import DIES
from tests.hosts.test_owners import COUNTS
from tests.hosts.test_owners import several as several
from tests.process.kills import COUNTING
from tests.process.runner import Runner, Running
from tests.process.training import TRAINING

pytestmark = pytest.mark.timeout(400)

# On which host each worker is.
THREE, TWO = (0, 1, 2), (0, 0, 1, 1)
SHAPES = pytest.mark.parametrize("places", [THREE, TWO], ids=["3x1", "2x2"])
STEPS, ROWS, WIDTH, WORDS = 12, 8000, 4, 7

# A step takes 12 samples, whatever the number of workers: bags of words, of which some are common.
TRAIN = f"""
import json
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

torch.set_default_dtype(torch.float64)
run = paceline.init()
torch.manual_seed(1)
words = torch.randint({ROWS}, (48, {WORDS}))
words[:, 0] %= 5
wanted = torch.randn(48, 1)
model = nn.Sequential(nn.EmbeddingBag({ROWS}, {WIDTH}, sparse=True), nn.Linear({WIDTH}, 1))
optimizer = torch.optim.KIND(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(words, wanted), batch_size=12 // run.num_workers)
model, optimizer, loader = run.wrap(model, optimizer, loader)
for epoch in range(3):
    for given, target in loader:
        optimizer.zero_grad()
        ((model(given) - target) ** 2).mean().backward()
        optimizer.step()
with open(f"{{sys.argv[1]}}{{run.rank}}.json", "w") as file:
    json.dump([p.detach().flatten().tolist() for p in model.parameters()], file)
"""

# What is counted lies in a table: the row of each sample in a batch gets one, whatever its gradient was divided by.
COUNTING_ROWS = (
    COUNTING.replace(
        "parameter.data.add_((parameter.grad != 0).to(parameter.dtype))",
        """rows = parameter.grad.coalesce()
                    parameter.data.index_add_(0, rows.indices()[0], (rows.values() != 0).to(parameter.dtype))""",
    )
    .replace(
        "counts = torch.nn.Parameter(torch.zeros(samples, dtype=torch.float64))",
        """counts = torch.nn.Embedding(samples, 1, sparse=True, dtype=torch.float64)
    torch.nn.init.zeros_(counts.weight)""",
    )
    .replace("Counting([counts])", "Counting(counts.parameters())")
)

# A table that leads the model, of words that depend on the sample and on the reader's random numbers.
READING = (
    TRAINING.replace("torch.randn(6) * 0.1 + number % 7", "torch.randint(8, (6,)) + 7 * (number % 7)")
    .replace("nn.Linear(6, 16)", "nn.EmbeddingBag(50, 16, sparse=True)")
    .replace("AdamW", "KIND")
    .replace("int(sys.argv[1]), int(sys.argv[2])", "3, 0")
)


def of_rows(script: str) -> str:
    """This script, with counts in a table."""
    return (
        script.replace("counts, optimizer, loader = job", "table, optimizer, loader = job")
        .replace(
            "optimizer, loader = run.wrap(optimizer, loader)",
            "table, optimizer, loader = run.wrap(table, optimizer, loader)\ncounts = table.weight",
        )
        .replace("counts[numbers].sum()", "table(numbers).sum()")
        .replace("counts.detach()", "counts.detach().flatten()")
    )


def start(
    runner: Runner, hosts: tuple[Host, ...], places: tuple[int, ...], *script: str, **variables: str
) -> list[Running]:
    """A worker at each place, by rank."""
    each = str(len(places) // len(set(places)))
    return test_owners.start(
        runner, tuple(hosts[place] for place in places), *script, LOCAL_WORLD_SIZE=each, **variables
    )


@pytest.mark.parametrize("several", [3], indirect=True)
@pytest.mark.parametrize(
    ("places", "kind"),
    [
        pytest.param(TWO, "SGD", marks=pytest.mark.long, id="2x2-SGD"),
        pytest.param(THREE, "SGD", marks=pytest.mark.long, id="3x1-SGD"),
        pytest.param(TWO, "Adagrad", marks=pytest.mark.long, id="2x2-Adagrad"),
        pytest.param(THREE, "Adagrad", marks=pytest.mark.long, id="3x1-Adagrad"),
    ],
)
def test_they_are_one_process_and_send_rows(
    runner: Runner, several: tuple[Host, ...], places: tuple[int, ...], kind: str
) -> None:
    runner.write("train.py", TRAIN.replace("KIND", kind))
    ended = [running.end() for running in reversed(start(runner, several, places, "train.py", "many"))]
    assert [end.code for end in ended] == [0] * len(places), "".join(end.err for end in ended)
    runner.python("train.py", "one")
    one = json.loads((runner.folder / "one0.json").read_text())
    many = [json.loads((runner.folder / f"many{rank}.json").read_text()) for rank in range(len(places))]
    for a, b in zip(many[0], one, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-15)
    assert all(own == many[0] for own in many)  # to the bit, on all hosts
    summary = ended[-1].summary
    assert (summary["status"], summary["workers"], summary["steps"]) == ("done", len(places), STEPS)
    # Parameters to begin with, to home and to each mirror, and the state, where there is any. Then what each host's
    # samples look up to the others, a number of 4 bytes and a row each; and the dense gradient, padded to 1 KiB, in
    # parts and as folds, as a ring would send it. All else is far less than a table.
    table, others = 8 * ROWS * WIDTH, max(places)
    copies = (1 + others) * (2 if kind == "Adagrad" else 1)
    steps = STEPS * others * (12 * WORDS * (4 + 8 * WIDTH) + 2 * 1024)
    assert steps < table / 2
    assert copies * table < summary["bytes_sent"] < (copies + 1 / 8) * table + steps


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
@pytest.mark.parametrize("moment", ["backward", "a", "b", "c"])
@pytest.mark.parametrize("dies", ["home", "elsewhere"])
@SHAPES
def test_who_dies_is_missed_by_nobody_and_every_sample_counts_once(
    runner: Runner, several: tuple[Host, ...], places: tuple[int, ...], dies: str, moment: str
) -> None:
    victim = 0 if dies == "home" else places.index(1)
    runner.write("counting.py", COUNTING_ROWS)
    runner.write("dies.py", of_rows(DIES))
    all_ = start(runner, several, places, "dies.py", str(victim), moment, "5")
    assert all_[victim].end().code == -signal.SIGKILL
    ended = [running.end() for rank, running in enumerate(all_) if rank != victim]
    assert [end.code for end in ended] == [0] * len(ended), "".join(end.err for end in ended)
    assert json.loads((runner.folder / "counts.json").read_text()) == [6.0] * 64


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
def test_two_that_do_not_reach_each_other_any_more_send_what_they_bring_home(
    runner: Runner, several: tuple[Host, ...]
) -> None:
    runner.write("counting.py", COUNTING_ROWS)
    runner.write("counts.py", of_rows(COUNTS))
    for rank in range(3):
        os.mkfifo(runner.folder / f"go{rank}")
    all_ = start(runner, several, THREE, "counts.py", "waits")
    for running in all_:
        running.until("is there")
    several[1].cut_from(several[2])
    for rank in range(3):
        runner.write(f"go{rank}", "")
    ended = [running.end() for running in reversed(all_)]
    assert [end.code for end in ended] == [0] * 3, "".join(end.err for end in ended)
    for rank in range(3):
        assert json.loads((runner.folder / f"counts{rank}.json").read_text()) == [4.0] * 62


@pytest.mark.long
@pytest.mark.parametrize("several", [3], indirect=True)
@pytest.mark.parametrize("kind", ["SGD", "Adagrad"])
@SHAPES
@pytest.mark.parametrize("every", [5, 6])  # each sixth round of four workers is one of three: there are 23 batches
def test_they_are_resumed_to_the_bit(
    runner: Runner, several: tuple[Host, ...], places: tuple[int, ...], every: int, kind: str
) -> None:
    script = READING.replace("KIND", kind)
    is_resumed_to_the_bit(runner, script, partial(start, runner, several, places), every=every)
