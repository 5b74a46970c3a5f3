"""A worker's own end of an exchange: its parameters, its gradients, and their places in the shared memory.

    gradients, or what H local steps left -> own slot          parameters <- where their newest values lie

At round paces parameters on the CPU are views of the one set of shared parameters, and there is nothing to pull; where
each worker has a copy, they are views of the copy in its slot, which who applies its push fills. Parameters whose
gradients are sparse rows are views of the one set at every pace: a worker reads rows while others' turns write rows
(Hogwild, Recht et al. 2011), so no step costs as much as the table is large. Parameters that cannot be views (on a
GPU, with ``share_parameters=False``, or stepped locally) are copied from there.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, optim

from paceline.errors import ConfigError
from paceline.params import optimizers, rows
from paceline.params.table import Table, same_bits, vector_dtype
from paceline.transport.slots import ExchangeMemory, Spec

_COMPARED = 2**19  # values at a time, which take no new memory each time


@dataclass
class Apart:
    """A gradient in memory of this process, laid out as in a slot."""

    gradient: dict[str, torch.Tensor]
    rows: dict[int, torch.Tensor]

    @staticmethod
    def of(table: Table) -> Apart:
        """Room for it; what is never written takes no memory."""
        entries = enumerate(table.entries)
        return Apart(
            {vector: torch.zeros(size, dtype=vector_dtype(vector)) for vector, size in table.sizes.items()},
            {param: torch.zeros(entry.rows + 1, dtype=torch.int64) for param, entry in entries if entry.row},
        )


class Replica:
    """The parameters of ``optimizer`` on this worker. ``views``: may they be views of shared memory? ``apart``: where
    gradients are written instead of the slot. ``travels``: does what is written go to another host?"""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        spec: Spec,
        memory: ExchangeMemory,
        rank: int,
        *,
        views: bool,
        apart: Apart | None = None,
        travels: bool = False,
    ) -> None:
        self._optimizer, self._memory = optimizer, memory
        self._names = [entry.name for entry in spec.table.entries]
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._adopts = [views and p.device.type == "cpu" for p in self.parameters]
        self._private = not all(self._adopts)
        self.slot = memory.slots[rank]
        entries, view = spec.table.entries, spec.table.view
        self.brought = self.slot if apart is None else apart
        self.gradient = self.brought.gradient
        gradients = [view(entry, self.gradient[entry.vector]) for entry in entries]
        self._dense = {i: gradients[i] for i, entry in enumerate(entries) if not entry.row}  # parameter -> its range
        self._vectors = sorted({entry.vector for entry in entries if not entry.row})
        self._by_rows = {i: gradients[i].view(-1) for i, entry in enumerate(entries) if entry.row}
        self._raw = {i for i in self._by_rows if optimizers.adds_rows(optimizer, self.parameters[i].dtype)}
        self._travels = travels
        self._shapes = [p.shape for p in self.parameters]
        self.shared = [view(entry, memory.params[entry.vector]) for entry in entries]
        home = memory.params | self.slot.copy
        self._home = [view(entry, home[entry.vector]) for entry in entries]
        self._on_device = sorted({p.device for p in self.parameters if p.device.type == "cuda"}, key=str)
        if self._on_device:
            memory.pin(rank)
        self._places: list[tuple[nn.Parameter, int]] = []
        self._settings: optimizers.Settings | None = None
        self._mask = bytes(len(entries))
        self._all = bytes([1]) * len(entries)
        self.early: set[int] = set()  # parameters whose gradients may be in the slot already
        self.written: set[int] = set()  # those that ``write_gradients`` has written
        self.before_rewriting: Callable[[], None] = lambda: None  # called before it writes any of the early ones

    def publish_parameters(self) -> None:
        """Fill the shared memory with this worker's parameters."""
        with torch.no_grad():
            for view, parameter in zip(self.shared, self.parameters, strict=True):
                if view.data_ptr() != parameter.data_ptr():
                    view.copy_(parameter)

    def publish_state(self, optimizer: optim.Optimizer) -> None:
        """Fill the shared memory with the state of an optimizer over these parameters, in place of what is there."""
        state = self._memory.state
        with torch.no_grad():
            own = [{key: _kept(value) for key, value in optimizer.state.get(p, {}).items()} for p in self.parameters]
            state.clear()
            for index, values in enumerate(own):
                if values:
                    state.fill(index, values)

    def adopt(self) -> None:
        """From now on the parameters lie in the shared memory, those that can."""
        for home, parameter, adopts in zip(self._home, self.parameters, self._adopts, strict=True):
            if adopts:
                parameter.data = home
                self._places.append((parameter, home.data_ptr()))
        self.pull()

    def pull(self) -> None:
        """Copy the newest values into those parameters that are not views of them."""
        if not self._private:
            return
        with torch.no_grad():
            for home, parameter, adopts in zip(self._home, self.parameters, self._adopts, strict=True):
                if not adopts:
                    parameter.copy_(home, non_blocking=True)

    def show_state(self) -> None:
        """Let the user's optimizer show the state in the shared memory (aliases, or copies for other devices)."""
        for index, (parameter, adopts) in enumerate(zip(self.parameters, self._adopts, strict=True)):
            state = self._memory.state.view(index)
            if state and not adopts:
                state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            if state:
                self._optimizer.state[parameter] = state

    def check_unchanged(self) -> None:
        """Raise ConfigError if the script has replaced a parameter's memory, or added parameters."""
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if count != len(self.parameters):
            raise ConfigError(
                f"the optimizer had {len(self.parameters)} parameters when it was wrapped and has {count} now",
                fix="add parameter groups before run.wrap",
            )
        for parameter, place in self._places:
            if parameter.data_ptr() != place:
                index = next(i for i, p in enumerate(self.parameters) if p is parameter)
                raise ConfigError(
                    f"parameter {self._names[index]} was given other memory after run.wrap",
                    why="its values lie in memory shared by the workers; .to(), .half() or .data = ... replace it",
                    fix="convert the model before run.wrap, or copy values in place: p.copy_(new)",
                )

    def write_gradients(self) -> bool:
        """Copy the gradients into the slot, and which parameters have one. Are all values finite?

        Those that are there already, as ``write_early`` or a deputy's link has put them there, are not copied.
        Raises ConfigError, before anything is written, for one that does not fit its parameter.
        """
        gradients = self._given()
        with torch.no_grad():
            for param, values in self._by_rows.items():
                raw = param in self._raw
                rows.write(self.brought.rows[param], values, gradients[param], raw=raw, travels=self._travels)
            given = {param: _dense(gradients[param]) for param in self._dense}
            others = {param: value for param, value in given.items() if not self._is_there(param, value)}
            self.written = set(others)
            if not self.early.isdisjoint(self.written):
                self.before_rewriting()
            there = [gradient for gradient in others.values() if gradient is not None]
            if there and len(there) == len(others):
                views = list(self._dense.values()) if len(there) == len(given) else [self._dense[p] for p in others]
                torch._foreach_copy_(views, there, non_blocking=True)
            else:
                for param, gradient in others.items():
                    if gradient is not None:
                        self._dense[param].copy_(gradient, non_blocking=True)
                    elif self._mask[param] or param in self.early:
                        self._dense[param].zero_()
            self.write_mask(bytes(gradient is not None for gradient in gradients))
            self.wait_for_device()
            there = [self.gradient[key] for key in self._vectors]
            there += [_rows_of(gradients[param]) for param in self._by_rows if gradients[param] is not None]
            return all(_is_finite(values) for values in there)

    def write_early(self, param: int) -> None:
        """Copy one dense gradient into the slot as soon as it is there. It may be another by the time of the step."""
        gradient = _dense(self.parameters[param].grad)
        if gradient is not None and gradient.shape == self._shapes[param]:
            self._dense[param].copy_(gradient)
            self.early.add(param)

    def _is_there(self, param: int, gradient: torch.Tensor | None) -> bool:
        if gradient is None:
            return not (self._mask[param] or param in self.early)
        view = self._dense[param]
        return gradient.data_ptr() == view.data_ptr() or (param in self.early and same_bits(view, gradient))

    def has_written(self, factor: torch.Tensor) -> bool:
        """Are the gradients, on the CPU and none of them rows, what was written last, times this, to the bit?"""
        gradients = [_dense(parameter.grad) for parameter in self.parameters]
        if bytes(gradient is not None for gradient in gradients) != self._mask or self._by_rows:
            return False
        is_one, given = float(factor) == 1.0, [(g, self._dense[i]) for i, g in enumerate(gradients) if g is not None]
        with torch.no_grad():
            return all(
                gradient.shape == view.shape
                and gradient.device.type == "cpu"
                and (same_bits(gradient, view) if is_one else _is_times(gradient, view, factor))
                for gradient, view in given
            )

    def has_finite_gradients(self) -> bool:
        """The same of the gradients where they are."""
        return all(_is_finite(_rows_of(gradient)) for gradient in self._given() if gradient is not None)

    def _given(self) -> list[torch.Tensor | None]:
        """The gradients, by parameter. Raises ConfigError for one that does not fit."""
        gradients = [parameter.grad for parameter in self.parameters]
        for place, gradient in enumerate(gradients):
            if gradient is not None and (gradient.shape != self._shapes[place] or gradient.is_sparse):
                rows.check(gradient, self._shapes[place], f"the gradient of {self._names[place]}")
        return gradients

    def not_finite(self) -> str:
        """The parameters, in words, whose gradients are not finite."""
        given = [(name, p.grad) for name, p in zip(self._names, self.parameters, strict=True) if p.grad is not None]
        bad = [name for name, gradient in given if not _is_finite(_rows_of(gradient))]
        if not bad:
            return "it is finite by now"  # the script has changed it since
        return f"first in {bad[0]}" + (f", in {len(bad)} of {len(given)} parameters" if len(given) > 1 else "")

    def add_gradients(self, *, first: bool) -> None:
        """Add the gradients to what is in the slot since the ``first`` of a period of local steps."""
        if first:
            self.write_gradients()
            return
        assert not self._by_rows, "sums of local steps are dense"
        gradients = [_dense(parameter.grad) for parameter in self.parameters]
        with torch.no_grad():
            for view, gradient in zip(self._dense.values(), gradients, strict=True):
                if gradient is not None:
                    view.add_(gradient.to(view.device))
        self.write_mask(bytes(h or g is not None for h, g in zip(self._mask, gradients, strict=True)))

    def write_difference(self) -> None:
        """Write (shared parameters - own) into the slot: the outer gradient of local steps (Douillard et al. 2023)."""
        with torch.no_grad():
            for view, shared, parameter in zip(self._dense.values(), self.shared, self.parameters, strict=True):
                torch.sub(shared, parameter.to(shared.device), out=view)
        self.write_mask(self._all)

    def write_settings(self, optimizer: optim.Optimizer) -> None:
        """Schedulers change hyper-parameters between steps; they travel only when they have changed."""
        if self._settings is None or self._settings.optimizer is not optimizer:
            self._settings = optimizers.Settings(optimizer)
        settings = self._settings.changed()
        if settings is None:
            return
        # How a shard steps (fused or not) was settled when the memory was laid out.
        kept = [{k: v for k, v in group.items() if k not in ("fused", "foreach")} for group in settings]
        self.slot.write_settings(optimizers.encode(kept))

    def write_mask(self, mask: bytes) -> None:
        """Into the slot: which parameters have a gradient."""
        if mask != self._mask:
            self._mask = mask
            self.slot.mask[:] = mask

    def wait_for_device(self) -> None:
        """Copies between a GPU and pinned memory are queued: a push may tell of them only when they are done."""
        for device in self._on_device:
            torch.cuda.current_stream(device).synchronize()


def _kept(value: object) -> object:
    """A tensor on its own: what was loaded may be an alias of the memory that is about to be filled."""
    return _dense(value.detach().clone()) if isinstance(value, torch.Tensor) else value


def _is_times(gradient: torch.Tensor, values: torch.Tensor, factor: torch.Tensor) -> bool:
    """Is it these values times the factor, to the bit?"""
    if not (gradient.is_contiguous() and values.is_contiguous()):
        return same_bits(gradient, values * factor)
    pieces = zip(gradient.view(-1).split(_COMPARED), values.view(-1).split(_COMPARED), strict=True)
    return all(same_bits(mine, part * factor) for mine, part in pieces)


def _rows_of(gradient: Any) -> torch.Tensor:
    values: torch.Tensor = gradient._values() if gradient.is_sparse else gradient
    return values.detach()


def _is_finite(values: torch.Tensor) -> bool:
    """A sum costs a reading and is finite, but for overflow, if and only if all values are."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None
    return cmath.isfinite(values.sum(dtype=wide).item()) or bool(torch.isfinite(values).all())


def _dense(value: Any) -> Any:
    return value.to_dense() if isinstance(value, torch.Tensor) and value.is_sparse else value
