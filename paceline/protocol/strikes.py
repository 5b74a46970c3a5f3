"""Gradients that are not finite: when is a worker out, and when has the run diverged?

Each is dropped, and is a strike against its worker. A worker's ``marks`` are its last RECENT gradients as bits, the
newest lowest, 1 where one was a strike.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

IN_A_ROW, RECENT = 3, 16


class Verdict(Enum):
    GO_ON = "the worker goes on"
    OUT = "the worker is out: it has too many strikes, most gradients are good"
    DIVERGED = "most gradients are strikes: it is not this worker's fault"


def marked(marks: int, *, strike: bool) -> int:
    """The marks with one more gradient."""
    return (marks << 1 | strike) & (1 << RECENT) - 1


def in_a_row(marks: int) -> int:
    """How many strikes there were without a good gradient in between, up to the newest."""
    return (~marks & marks + 1).bit_length() - 1


def judge(marks: int, of_others: Sequence[int]) -> Verdict:
    """After a strike of the worker with these ``marks``; ``of_others``: those of the other workers that train.

    It has too many with IN_A_ROW, or more than half of RECENT. Then the gradients of all workers in such a stretch are
    counted; those of others that are just being computed are not among them, so it takes more than half.
    """
    if in_a_row(marks) >= IN_A_ROW:
        stretch = IN_A_ROW
    elif 2 * marks.bit_count() > RECENT:
        stretch = RECENT
    else:
        return Verdict.GO_ON
    everybody = (marks, *of_others)
    strikes = sum((one & (1 << stretch) - 1).bit_count() for one in everybody)
    return Verdict.DIVERGED if 2 * strikes > stretch * len(everybody) else Verdict.OUT
