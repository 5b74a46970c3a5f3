"""Ctrl-C reaches a worker that waits for others, also where it learns of it by another one's end."""

from typing import Any

import pytest

from paceline.config import Bounded, Pace, Quorum
from paceline.protocol.rounds import Waiting
from tests.unit.engine.pacing import Counts, on_workers


@pytest.mark.parametrize("pace", [Quorum(2), Bounded(0)], ids=str)
def test_ctrl_c_interrupts_the_script_of_a_worker_that_waits(pace: Pace) -> None:
    def body(run: Any) -> str:
        counts = Counts(2)
        run.wrap(counts.optimizer)
        board, memory = run.worker.context.board, run.worker.exchanges[0]._memory
        if run.rank == 1:
            board.wait(lambda: memory.pushed[0] == 1 or Waiting(board.common, "held"))
            board.set_interrupt()
        try:
            for _ in range(5):
                counts.bring(run.rank)
                counts.optimizer.step()
        except KeyboardInterrupt:
            return "interrupted"
        return "finished"

    assert on_workers(body, pace=pace) == ["interrupted"] * 2
