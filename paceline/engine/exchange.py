"""A worker's side of an optimizer's exchange: what happens inside ``optimizer.step()``.

    gradient -> own slot -> push -> (round closes) -> fold and step own share -> (all have) -> go on

Parameters on the CPU are views of the shared memory, so there is nothing to pull. Others (on a GPU, or with
``share_parameters=False``) are copied back from it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import msgspec
import torch
from torch import nn, optim

from paceline.engine.stepper import Stepper
from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.table import differences, tabulate
from paceline.protocol.partition import Piece, padded
from paceline.protocol.rounds import Closed, Waiting, close_round, reached
from paceline.transport.board import Board
from paceline.transport.slots import ExchangeMemory, Spec


@dataclass(frozen=True, slots=True)
class Round:
    """What a round was: its number, who contributed, and how long this worker waited and worked (seconds)."""

    number: int
    contributors: tuple[int, ...]
    waiting_s: float
    exchanging_s: float


@dataclass(frozen=True, slots=True)
class Push:
    """What goes with a gradient: samples behind it, (sum of loss x samples, samples) since the last look, and
    whether this worker asks that the round be the last."""

    weight: float
    loss: tuple[float, float]
    stop: bool


class Exchange:
    """One wrapped optimizer. ``spec`` is made before the memory exists; ``attach`` completes it."""

    def __init__(
        self, optimizer: optim.Optimizer, names: dict[int, str], board: Board, rank: int, *, share: bool
    ) -> None:
        optimizers.check(optimizer, servers=board.servers)
        self.optimizer = optimizer
        self._board, self._rank = board, rank
        self._parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        if not self._parameters:
            raise ConfigError("the optimizer has no parameters")
        self._shared = [share and p.device.type == "cpu" for p in self._parameters]
        self._spec = self._describe(names)

    @property
    def spec(self) -> Spec:
        return self._spec

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    @property
    def number(self) -> int:
        """The last round this worker knows to be over."""
        return max(self._memory.stepped)

    def attach(self, memory: ExchangeMemory) -> None:
        """Take the memory into use; worker 0 must call ``publish`` before anyone calls ``adopt``."""
        self._memory = memory
        self._slot = memory.slots[self._rank]
        table = self._spec.table
        self._slot_views = [table.view(e, self._slot.gradient[e.dtype]) for e in table.entries]
        self._views = [table.view(e, memory.params[e.dtype]) for e in table.entries]
        self._stepper = Stepper(self._spec, memory, type(self.optimizer), vars(self.optimizer))
        self._sent_settings: list[optimizers.Group] = []
        self._mask = bytes(len(table.entries))
        self._all = bytes([1]) * len(table.entries)
        self._servers = tuple(range(self._spec.workers, self._spec.workers + self._spec.servers))

    def publish(self) -> None:
        """Worker 0: fill the memory with its parameters and its optimizer's state."""
        state = self._memory.state
        with torch.no_grad():
            for index, (view, parameter) in enumerate(zip(self._views, self._parameters, strict=True)):
                view.copy_(parameter)
                own = self.optimizer.state.get(parameter)
                if own:
                    whole = Piece(index, 0, padded(parameter.numel()))
                    state.save(whole, dict(own), whole=True)

    def adopt(self) -> None:
        """Everyone: take the published parameters; from now on they lie in the shared memory."""
        self._pull()
        for view, parameter, shared in zip(self._views, self._parameters, self._shared, strict=True):
            if shared:
                parameter.data = view
        self._places = [
            (parameter, view.data_ptr())
            for view, parameter, shared in zip(self._views, self._parameters, self._shared, strict=True)
            if shared
        ]
        self._private = not all(self._shared)
        self.optimizer.state.clear()
        self.optimizer.register_state_dict_pre_hook(lambda _: self.show_state())

    def show_state(self) -> None:
        """Let the user's optimizer show the state in the shared memory (aliases, or copies for other devices)."""
        for index, (parameter, shared) in enumerate(zip(self._parameters, self._shared, strict=True)):
            state = self._memory.state.view(index)
            if state and not shared:
                state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            if state:
                self.optimizer.state[parameter] = state

    def step(self, push: Push) -> Round:
        """Exchange and step once. Returns when the parameters are those of the next version.

        Every worker that has data must come here for the round to close. Raises Aborted if the run is stopped
        while waiting.
        """
        begun = time.monotonic()
        board, memory = self._board, self._memory
        number = max(memory.stepped) + 1
        self._check_unchanged()
        self._write_gradients()
        self._write_settings()
        self._slot.write(number, push.weight, push.loss, push.stop)
        memory.pushed[self._rank] = number
        board.ring(self._rank)
        pushed = time.monotonic()
        if self._servers:
            board.wait(lambda: reached(number, memory.stepped, self._servers))
            contributors = tuple(w for w, slot in enumerate(memory.slots) if slot.pushed_in(number))
            closed = stepped = pushed  # all the time until the servers are done is waiting
        else:
            contributors = board.wait(lambda: close_round(number, memory.pushed, board)).contributors
            closed = time.monotonic()
            if self._stepper.take_up(number, contributors, self._rank):
                memory.ready[self._rank] = number
                board.ring(self._rank)
                board.wait(lambda: reached(number, memory.ready, contributors))
            self._stepper.step(number, contributors)
            memory.stepped[self._rank] = number
            board.ring(self._rank)
            stepped = time.monotonic()
            board.wait(lambda: reached(number, memory.stepped, contributors))
        done = time.monotonic()
        if self._private:
            self._pull()
        waiting = (closed - pushed) + (done - stepped)
        return Round(number, contributors, waiting, time.monotonic() - begun - waiting)

    def norm(self, chosen: bytes, order: float, weight: float) -> float:
        """The norm of the gradient as it will be folded, over the parameters ``chosen`` here or on another worker.

        Every worker in the round must call it before its ``step``, equally often. Raises ConfigError if one has not.
        """
        board, memory = self._board, self._memory
        number, round_ = max(memory.answered) + 1, max(memory.stepped) + 1
        self._write_gradients()
        self._slot.chosen[:] = chosen
        self._slot.write_weight(round_, weight)
        memory.asked[self._rank] = number
        board.ring(self._rank)
        contributors = board.wait(lambda: self._all_ask(number, round_)).contributors
        self._slot.write_norm(self._stepper.norm(round_, contributors, self._rank, order))
        memory.answered[self._rank] = number
        board.ring(self._rank)
        board.wait(lambda: reached(number, memory.answered, contributors))
        parts = [memory.slots[worker].norm for worker in contributors]
        return max(parts) if order == math.inf else sum(parts) ** (1.0 / order)

    def _all_ask(self, number: int, round_: int) -> Closed | Waiting:
        memory = self._memory
        for worker, pushed in enumerate(memory.pushed):
            if pushed >= round_ and memory.asked[worker] < number:
                raise ConfigError(
                    f"worker {self._rank} clips its gradients in round {round_}, worker {worker} does not",
                    why="the norm is that of all workers' gradient, so all must ask for it",
                    fix="call clip_grad_norm_ on every worker, or on none",
                )
        return close_round(number, memory.asked, self._board)

    def losses(self, number: int, contributors: tuple[int, ...]) -> tuple[float, float]:
        """Sums over the contributors of round ``number``, the last, of (loss x samples, samples)."""
        pairs = [self._memory.slots[worker].loss(number) for worker in contributors]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def asked_to_stop(self, number: int, contributors: tuple[int, ...]) -> bool:
        return any(self._memory.slots[worker].stop(number) for worker in contributors)

    def _describe(self, names: dict[int, str]) -> Spec:
        optimizer, kind = self.optimizer, type(self.optimizer)
        groups = optimizer.param_groups
        numbered = ((g, p) for g, group in enumerate(groups) for p in group["params"])
        table = tabulate((names.get(id(p), f"parameter {i}"), g, p) for i, (g, p) in enumerate(numbered))
        settings = optimizers.settings(optimizer)
        for group, plain in zip(groups, settings, strict=True):
            dtypes = [p.dtype for p in group["params"]]
            if optimizers.choose_fused(kind, plain, dtypes, torch.device("cpu")):
                plain["fused"] = True
        encoded = optimizers.encode(settings)
        elementwise = optimizers.is_elementwise(kind)
        items = optimizers.describe_state(
            table,
            optimizers.decode(encoded),
            lambda asked: optimizers.clone(vars(optimizer), kind, asked),
            [optimizer.state.get(p) or {} for p in self._parameters],
            elementwise=elementwise,
        )
        return Spec(
            table=table,
            optimizer=optimizers.class_path(kind),
            whole=not elementwise,
            settings=encoded,
            settings_bytes=4 * len(encoded) + 4096,
            state=items,
            workers=self._board.workers,
            servers=self._board.servers,
        )

    def _check_unchanged(self) -> None:
        count = sum(len(group["params"]) for group in self.optimizer.param_groups)
        if count != len(self._parameters):
            raise ConfigError(
                f"the optimizer had {len(self._parameters)} parameters when it was wrapped and has {count} now",
                fix="add parameter groups before run.wrap",
            )
        for parameter, place in self._places:
            if parameter.data_ptr() != place:
                index = next(i for i, p in enumerate(self._parameters) if p is parameter)
                raise ConfigError(
                    f"parameter {self._spec.table.entries[index].name} was given other memory after run.wrap",
                    why="its values lie in memory shared by the workers; .to(), .half() or .data = ... replace it",
                    fix="convert the model before run.wrap, or copy values in place: p.copy_(new)",
                )

    def _write_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            gradients = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
        with torch.no_grad():
            given = [gradient for gradient in gradients if gradient is not None]
            if len(given) == len(gradients):
                if self._mask != self._all:
                    self._mask = self._all
                    self._slot.mask[:] = self._mask
                torch._foreach_copy_(self._slot_views, given)
                return
            mask = bytes(gradient is not None for gradient in gradients)
            for view, gradient, had in zip(self._slot_views, gradients, self._mask, strict=True):
                if gradient is not None:
                    view.copy_(gradient)
                elif had:
                    view.zero_()
            self._mask = mask
            self._slot.mask[:] = mask

    def _write_settings(self) -> None:
        """Schedulers change hyper-parameters between steps; they travel only when they have changed."""
        settings = optimizers.settings(self.optimizer)
        if settings == self._sent_settings:
            return
        self._sent_settings = settings
        # How a shard steps (fused or not) was settled when the memory was laid out.
        kept = [{k: v for k, v in group.items() if k not in ("fused", "foreach")} for group in settings]
        self._slot.write_settings(optimizers.encode(kept))

    def _pull(self) -> None:
        with torch.no_grad():
            for view, parameter, shared in zip(self._views, self._parameters, self._shared, strict=True):
                if not shared or parameter.data_ptr() != view.data_ptr():
                    parameter.copy_(view)


def compare(mine: Spec, first: bytes, rank: int) -> None:
    """Raise ConfigError, in words, if this worker's spec is not worker 0's (``first``, encoded)."""
    if msgspec.msgpack.encode(mine) == first:
        return
    other = msgspec.msgpack.decode(first, type=Spec)
    told = differences(mine.table, other.table, f"worker {rank}", "worker 0")
    if not told and mine.optimizer != other.optimizer:
        told = f"the optimizer is {mine.optimizer} on worker {rank}, {other.optimizer} on worker 0"
    if not told:
        told = f"the optimizer's settings or state differ on worker {rank} and worker 0"
    raise ConfigError(
        f"workers do not train the same model: {told}",
        fix="build model and optimizer the same way on every worker; only data and random numbers may differ",
    )
