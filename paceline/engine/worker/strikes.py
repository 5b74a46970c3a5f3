"""A worker's account of its gradients that are not finite; the rule is in ``protocol/strikes.py``."""

from __future__ import annotations

from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.errors import Diverged, Poisoned
from paceline.protocol import messages
from paceline.protocol.rounds import PRESENT
from paceline.protocol.strikes import IN_A_ROW, RECENT, Verdict, in_a_row, judge, marked


class Strikes:
    def __init__(self, context: Context) -> None:
        self._board, self._channel, self._rank = context.board, context.channel, context.rank
        self._marks: dict[int, int] = {}  # by exchange; absent: none of late

    def take(self, index: int, exchange: Exchange, step: int) -> None:
        """Exchange ``index`` has made a step. Raises Poisoned or Diverged when it was one strike too many."""
        if exchange.was_finite and index not in self._marks:
            return
        marks = marked(self._marks.pop(index, 0), strike=not exchange.was_finite)
        if marks:
            self._marks[index] = marks
        board, told = self._board, 0
        for one in self._marks.values():
            told |= one
        board.strikes[self._rank] = told
        if exchange.was_finite:
            return
        present = [w for w in range(board.width) if w != self._rank and board.gone[w] == PRESENT]
        what = f"worker {self._rank}: the gradient of step {step} was not finite and was dropped; {exchange.not_finite}"
        match judge(marks, [board.strikes[worker] for worker in present]):
            case Verdict.GO_ON:
                self._channel.send(messages.Alarm(f"{what} ({in_a_row(marks)} of {IN_A_ROW} in a row)"))
            case Verdict.OUT:
                raise Poisoned(
                    f"{what}, {_how_many(marks)}",
                    why="most of the other workers' are finite, so it may be this one's data, or what it alone keeps",
                    fix="a look at its part of the data; its last output is in its log",
                )
            case Verdict.DIVERGED:
                raise Diverged(
                    f"{what}, {_how_many(marks)}, and more than half of all workers' gradients of late were like it",
                    why="the loss is no longer a number; gradients that were dropped have changed no parameter",
                    fix="lower the learning rate, try --clip 1, look at the data; then paceline resume, or run anew",
                )


def _how_many(marks: int) -> str:
    row = in_a_row(marks)
    return f"the {row}rd in a row" if row == IN_A_ROW else f"one of {marks.bit_count()} among its last {RECENT}"
