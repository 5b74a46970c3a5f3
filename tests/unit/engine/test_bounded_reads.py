"""What a worker at pace bounded has seen when it is let into its next step."""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Bounded
from paceline.protocol.rounds import Waiting
from tests.unit.engine.pacing import Counts, on_workers


def test_an_admitted_reader_has_seen_what_its_admission_rests_on() -> None:
    """Worker 1's push comes after worker 0's was applied and before worker 0 looks at the clocks: it is within the
    bound at once, and goes on with a copy that has not got worker 1's push in it."""

    def body(run: Any) -> list[int]:
        counts = Counts(2)
        run.wrap(counts.optimizer)
        board, memory = run.worker.context.board, run.worker.exchanges[0]._memory
        wait = board.wait

        def slow(ask: Any) -> Any:
            answer = wait(ask)
            if memory.log.version >= 1:
                wait(lambda: memory.clocks[1] >= 1 or Waiting(1, "held"))
            return answer

        counts.bring(run.rank)
        if run.rank == 0:
            board.wait = slow
        else:
            wait(lambda: (memory.log.version == 1 and min(memory.applied) >= memory.log.appended) or Waiting(2, "held"))
        counts.optimizer.step()
        return counts.seen

    assert on_workers(body, servers=1, pace=Bounded(0))[0] == [1, 1]


def test_a_clock_catches_up_to_the_past_pass_only() -> None:
    """Three batches a worker in two passes, but worker 1 leaves the first after one. It comes to the second after
    worker 0's first step there: were its clock 4, as if it had taken that step, worker 0 could be s+1 ahead of it."""

    def body(run: Any) -> list[int]:
        counts, begun = Counts(2), []
        _, loader = run.wrap(counts.optimizer, DataLoader(TensorDataset(torch.arange(6.0))))
        board, memory = run.worker.context.board, run.worker.exchanges[0]._memory
        wait = board.wait

        def slow(ask: Any) -> Any:
            answer = wait(ask)
            if board.parked[1]:
                wait(lambda: memory.clocks[0] >= 4 or Waiting(0, "held"))
            return answer

        for number in range(2):
            if run.rank == 1:
                board.wait = slow
            for index, _ in enumerate(loader):
                if index == 0:
                    begun.append(memory.clocks[run.rank])
                counts.bring(run.rank)
                counts.optimizer.step()
                if run.rank == 1 and number == 0:
                    break
        return begun

    assert on_workers(body, pace=Bounded(0))[1] == [0, 3]
