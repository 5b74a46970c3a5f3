"""The launcher's side of checkpoints: written when it is whole, and no sooner."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.saver import Saver
from paceline.engine.checkpoint.snapshot import send
from paceline.transport.channel import Channel


class Job:
    """A saver that gets what workers send."""

    def __init__(self, directory: Path, workers: int = 2) -> None:
        self.told: list[tuple[str, str]] = []
        self.store = Checkpoints(directory)
        self.saver = Saver(self.store, workers, lambda kind, text: self.told.append((kind, text)))

    def give(
        self, rank: int, number: int, groups: Mapping[str, Any], documents: Mapping[str, Any], step: int = 0
    ) -> None:
        mine, its = Channel.pair()
        send(mine, number, step, groups, documents)
        ((message, descriptors),) = its.drain()
        self.saver.take(rank, message, descriptors[0])
        mine.close()
        its.close()

    def own(self, rank: int, number: int) -> None:
        self.give(rank, number, {f"worker-{rank}": {"a": torch.tensor([rank])}}, {f"worker-{rank}": {"rank": rank}})

    def shared(self, rank: int, number: int, step: int) -> None:
        values = torch.arange(6.0).view(2, 3).t()
        self.give(rank, number, {"model": {"w": values}, "optimizer": {}}, {"state": {"step": step}}, step)


def test_a_checkpoint_is_written_when_all_parts_are_there(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.own(1, 7)
    job.shared(0, 7, step=70)
    job.saver.turn()
    assert job.store.paths() == []
    job.own(0, 7)
    job.saver.close()
    ((kind, text),) = job.told
    assert kind == "checkpoint"
    assert text.startswith("step 70 is saved in ")
    loaded = job.store.load()
    assert (loaded.step, loaded.documents["worker-1"]) == (70, {"rank": 1})
    dtype, shape, data = loaded.tensors["model"]["w"]
    assert (dtype, shape) == ("float32", (3, 2))
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


@pytest.mark.parametrize("finished", [False, True])
def test_who_is_gone_is_not_waited_for(finished: bool, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.shared(0, 7, step=70)
    job.own(0, 7)
    job.saver.lost(1, finished=finished)
    job.saver.close()
    assert [path.name for path in job.store.paths()] == ["step-00000070"]
    job.shared(0, 8, step=80)
    job.own(0, 8)
    job.saver.close()
    assert len(job.store.paths()) == (2 if finished else 1)  # another may have taken its place


def test_an_older_one_that_was_not_whole_is_forgotten(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.shared(0, 7, step=70)
    job.own(0, 7)
    for rank in (0, 1):
        job.own(rank, 8)
    job.shared(1, 8, step=80)
    job.own(1, 7)
    job.saver.close()
    assert [path.name for path in job.store.paths()] == ["step-00000080"]


def test_what_cannot_be_written_is_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    job.shared(0, 7, step=70)
    for rank in (0, 1):
        job.own(rank, 7)
    job.saver.close()
    ((kind, text),) = job.told
    assert kind == "alarm"
    assert "the checkpoint of step 70 could not be written" in text
    assert job.store.paths() == []
    assert msgspec.json.encode(text)
