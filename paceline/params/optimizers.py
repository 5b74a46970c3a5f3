"""What paceline must know of an optimizer's class to step a part of its parameters elsewhere.

A part is stepped by a *clone*: an object of the user's own class with the same settings, other parameters and
state of its own. For elementwise classes a part may be any range of values (of rows, where gradients are sparse
rows); others are cut between parameters. What state a class keeps, and whether it takes sparse gradients, is found by
asking it: one step on zeros.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import optim

from paceline.errors import ConfigError
from paceline.params import rows
from paceline.params.table import DTYPES, Entry, Table, dtype_name
from paceline.protocol.partition import ALIGN

ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.ASGD,
    optim.Rprop,
    optim.SparseAdam,
)
_SCALARS = ("step", "eta", "mu", "mu_product")  # of the classes above
_FUSED_ON_CPU = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
# Not the 16-bit ones: torch 2.13's fused SGD on the CPU leaves bfloat16 and float16 parameters as they were.
_FUSED_DTYPES = (torch.float32, torch.float64)
Group = dict[str, Any]


class StateItem(msgspec.Struct, frozen=True):
    """One thing an optimizer keeps for one parameter, under ``key``.

    ``kind`` is "like" (a tensor with one value for each of the parameter's), "tensor" (of ``shape``), "int" or
    "float" (a Python number).
    """

    param: int
    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]


def is_elementwise(optimizer_class: type) -> bool:
    """May a parameter of this class be stepped in pieces? Subclasses may do anything, so they may not."""
    return optimizer_class in ELEMENTWISE


def check(optimizer: optim.Optimizer, *, servers: int = 0) -> None:
    """Refuse what cannot be shared. Raises ConfigError."""
    own = own_attributes(optimizer)
    if servers and own:
        raise ConfigError(
            f"{type(optimizer).__name__} keeps {own[0]!r} in the object; a server has the class and param_groups only",
            fix="keep it in param_groups (the constructor's defaults), or use --servers 0",
        )
    if isinstance(optimizer, optim.LBFGS):
        raise ConfigError(
            "LBFGS evaluates the loss several times within one step, so its gradients cannot be exchanged once",
            fix="SGD, Adam, AdamW or another optimizer that steps once from given gradients",
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty and type(optimizer) is not optim.LBFGS:
        raise ConfigError(
            f"{type(optimizer).__name__}.step needs a closure, to evaluate the loss again within a step; its gradients "
            "cannot be exchanged once",
            fix="SGD, Adam, AdamW or another optimizer that steps once from given gradients",
        )


def own_attributes(optimizer: optim.Optimizer) -> list[str]:
    """What an optimizer of a class that torch does not have keeps beside its param_groups and state."""
    if type(optimizer) in ELEMENTWISE:
        return []
    return [name for name in vars(optimizer) if name not in _USUAL and not name.startswith("_")]


def takes_rows(optimizer: optim.Optimizer, parameter: torch.Tensor, group: Group) -> bool:
    """Is ``parameter``, a table of ``group`` with sparse gradients, stepped by rows? One step of a row of zeros tells.

    Not if the optimizer's state for it would be a sparse tensor, as SGD's momentum is, which moves every row ever seen
    at each step: such gradients are exchanged dense. Raises ConfigError if the class refuses sparse gradients.
    """
    name, existing = type(optimizer).__name__, optimizer.state.get(parameter) or {}
    if _has_sparse(existing):
        return False
    table = torch.zeros(1, parameter.shape[1], dtype=parameter.dtype)
    table.grad = rows.gradient_of(rows.Rows(torch.zeros(1, dtype=torch.int64), table.clone()), table.shape)
    asked = clone(vars(optimizer), type(optimizer), [restore(group) | {"params": [table]}])
    for key, value in existing.items():
        if isinstance(value, torch.Tensor):  # whose values home, which makes the optimizer anew, need not know
            value = torch.zeros_like(value[:1] if value.shape == parameter.shape else value, device="cpu")
        asked.state[table][key] = value
    try:
        with rows.unchecked():
            asked.step()
    except RuntimeError as error:
        raise ConfigError(
            f"{name} does not step the sparse gradients of an embedding with sparse=True: {str(error).splitlines()[0]}",
            why="gradients of such embeddings travel and are stepped as rows",
            fix="SparseAdam, or SGD or Adagrad without weight_decay, for the embeddings (an optimizer of their own "
            "beside the one for the rest), or build them with sparse=False",
        ) from None
    return not _has_sparse(asked.state[table])


def adds_rows(optimizer: optim.Optimizer, dtype: torch.dtype) -> bool:
    """Does a step only add the rows of a sparse gradient to the table, so that duplicates need not be summed before?

    Of 16-bit rows sums run in 32 bits, so those are summed.
    """
    return type(optimizer) is optim.SGD and dtype in (torch.float32, torch.float64)


def _has_sparse(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_sparse for value in state.values())


def check_rows(optimizer: optim.Optimizer, table: Table) -> None:
    """Raise ConfigError if a class that takes nothing but rows has a parameter with a dense gradient."""
    dense = next((entry.name for entry in table.entries if not entry.row), None)
    if isinstance(optimizer, optim.SparseAdam) and dense is not None:
        raise ConfigError(
            f"SparseAdam has {dense}, whose gradient is exchanged dense; it steps sparse gradients only",
            why="sparse are the gradients of nn.Embedding and nn.EmbeddingBag with sparse=True in a model that "
            "run.wrap was given with the optimizer or before",
            fix="Adam for the other parameters, SparseAdam for these embeddings; give the model to run.wrap",
        )


def settings(optimizer: optim.Optimizer) -> list[Group]:
    """The groups' hyper-parameters as plain values, without their parameters."""
    return [{k: _plain(v) for k, v in g.items() if k not in _NOT_SETTINGS} for g in optimizer.param_groups]


def load_settings(optimizer: optim.Optimizer, groups: Sequence[Group]) -> None:
    """Set those hyper-parameters that the optimizer has. Raises ConfigError for another number of groups."""
    if len(groups) != len(optimizer.param_groups):
        raise ConfigError(f"settings of {len(groups)} groups are not for {len(optimizer.param_groups)}")
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        for key, value in new.items():
            if key not in group:
                continue
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


class Settings:
    """The settings of one optimizer, looked at before every step: whether they have changed must be cheap to tell."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._seen: list[list[Any]] = []
        self._told: list[Group] = []

    def changed(self) -> list[Group] | None:
        """``settings`` of the optimizer, if they are not what was told last."""
        now = [list(group.values()) for group in self.optimizer.param_groups]
        same = len(now) == len(self._seen) and all(map(_identical, now, self._seen))
        if same:
            return None
        found = settings(self.optimizer)
        # What can be changed in place has to be looked at every time.
        groups = zip(self.optimizer.param_groups, found, strict=True)
        settled = all(_is_settled(group[key]) for group, told in groups for key in told)
        self._seen = now if settled else []
        if found == self._told:
            return None
        self._told = found
        return found


def _is_settled(value: Any) -> bool:
    """Is it a value that nothing can change in place?"""
    if isinstance(value, tuple):
        return all(_is_settled(item) for item in value)
    return isinstance(value, int | float | str | bytes | None)


def _identical(now: list[Any], seen: list[Any]) -> bool:
    return len(now) == len(seen) and all(map(operator.is_, now, seen))


_NOT_SETTINGS = ("params", "param_names")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def restore(plain: Group) -> Group:
    """Undo what the wire did to ``settings``: sequences (betas, etas) are tuples again."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def encode(groups: list[Group]) -> bytes:
    """Raises ConfigError for a setting that is no number, text, truth value or sequence of them."""
    try:
        return msgspec.msgpack.encode(groups)
    except (TypeError, OverflowError) as error:
        raise ConfigError(
            f"a parameter group holds a setting that cannot be sent to other processes: {error}",
            fix="keep numbers, texts, truth values, None and sequences of them in param_groups",
        ) from None


def decode(data: bytes) -> list[Group]:
    """Raises ConfigError for what are no settings."""
    try:
        groups: list[Group] = msgspec.msgpack.decode(data, type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ConfigError(f"settings have come that are none: {error}") from None
    return [restore(group) for group in groups]


def clone(source: Mapping[str, Any], optimizer_class: type, groups: list[Group]) -> optim.Optimizer:
    """An optimizer of the class with these groups (``params`` included), empty state and no hooks.

    ``source`` is the attributes of the user's object (``vars(optimizer)``), or empty in a server. The
    constructor is not called: not every class takes its own defaults back.
    """
    fresh: optim.Optimizer = object.__new__(optimizer_class)
    own = {k: v for k, v in source.items() if k not in _INSTANCE_ONLY and not k.startswith("_optimizer_")}
    vars(fresh).update(own)
    vars(fresh).update(
        defaults=dict(own.get("defaults", {})),
        state=defaultdict(dict),
        param_groups=groups,
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
        _optimizer_state_dict_pre_hooks=OrderedDict(),
        _optimizer_state_dict_post_hooks=OrderedDict(),
        _optimizer_load_state_dict_pre_hooks=OrderedDict(),
        _optimizer_load_state_dict_post_hooks=OrderedDict(),
    )
    fresh.__setstate__({})  # fills in what older or partial objects lack
    return fresh


_USUAL = ("defaults", "state", "param_groups", "step", "zero_grad", "fused", "foreach")
_INSTANCE_ONLY = ("step", "state", "param_groups", "defaults", "zero_grad")


def class_path(optimizer_class: type) -> str:
    return f"{optimizer_class.__module__}:{optimizer_class.__qualname__}"


def find_class(path: str) -> type:
    """The class named by ``class_path``. Raises ConfigError if this process cannot import it."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, TypeError, ValueError):  # also for what is no name of a module
        found = None
    if module == "__main__" or not isinstance(found, type):
        raise ConfigError(
            f"optimizer {name} is defined where a server cannot import it ({module})",
            fix="move the class to a module beside the script, or use --servers 0",
        )
    return found


def choose_fused(optimizer_class: type, group: Group, dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    """Step with the fused kernel? Yes where torch has one and the user has not chosen otherwise.

    One AdamW step of 10 M values on one thread took 67 ms as one flat tensor, 45 foreach, 7.9 fused.
    """
    if optimizer_class not in _FUSED_ON_CPU or device.type != "cpu":
        return False
    undecided = group.get("fused") is None and group.get("foreach") is None
    plain = not group.get("differentiable") and not group.get("capturable")
    if group.get("dampening"):
        return False  # its first step is unlike the others, and torch's fused SGD has one for all tensors
    return undecided and plain and all(dtype in _FUSED_DTYPES for dtype in dtypes)


def describe_state(
    table: Table,
    groups: list[Group],
    make: Callable[[list[Group]], optim.Optimizer],
    existing: Sequence[Mapping[str, Any]],
    *,
    elementwise: bool,
) -> tuple[StateItem, ...]:
    """What the optimizer keeps for each parameter: what it has already, or what one step on zeros leaves.

    ``existing[i]`` is the state of parameter i, empty if there is none yet (Adagrad makes it when constructed, a
    loaded checkpoint brings it). ``groups`` has the settings as they will be stepped. Elementwise classes are
    asked once a group and dtype, others with each parameter's own shape. Raises ConfigError.
    """
    found: list[StateItem] = []
    known: dict[tuple[int, str], list[StateItem]] = {}
    for index, entry in enumerate(table.entries):
        group = groups[entry.group]
        if any(isinstance(value, torch.Tensor) for value in existing[index].values()):
            items = _items(existing[index], entry.shape, bool(group.get("fused")), elementwise)
        else:
            asked = (entry.group, entry.vector) if elementwise else (index, "")
            if asked not in known:
                known[asked] = _probe(entry, group, make, elementwise)
            items = known[asked]
        for item in items:
            shape = entry.shape if item.kind == "like" else item.shape
            found.append(StateItem(index, item.key, item.kind, item.dtype, shape))
    return tuple(found)


def _probe(
    entry: Entry, group: Group, make: Callable[[list[Group]], optim.Optimizer], elementwise: bool
) -> list[StateItem]:
    shape = entry.shape if not elementwise else (ALIGN, entry.row) if entry.row else (ALIGN,)
    dummy = torch.zeros(shape, dtype=DTYPES[entry.dtype])
    dummy.grad = torch.zeros_like(dummy)
    if entry.row:
        dummy.grad = rows.gradient_of(rows.Rows(torch.zeros(1, dtype=torch.int64), dummy[:1].clone()), shape)
    asked = make([group | {"params": [dummy]}])
    with rows.unchecked():
        asked.step()
    return _items(asked.state[dummy], shape, bool(group.get("fused")), elementwise)


def _items(state: Mapping[str, Any], shape: tuple[int, ...], fused: bool, elementwise: bool) -> list[StateItem]:
    items = []
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            dtype = dtype_name(value.dtype, f"optimizer state {key!r}")
            if fused and key == "step":
                dtype = "float32"  # what the fused kernels read, whatever the default dtype was
            # Of a parameter of shape () a whole class's state is a tensor like any other; an elementwise class's is
            # stepped as a vector, so there the class's own scalars are known by name.
            like = key not in _SCALARS if elementwise else tuple(value.shape) == shape and shape != ()
            kind = "like" if like else "tensor"
            items.append(StateItem(0, key, kind, dtype, tuple(value.shape)))
        elif isinstance(value, bool | int):
            items.append(StateItem(0, key, "int", "float64", ()))
        elif isinstance(value, float):
            items.append(StateItem(0, key, "float", "float64", ()))
        elif value is not None:
            raise ConfigError(
                f"the optimizer keeps {key!r} as {type(value).__name__}; state must be tensors and numbers",
                why="its state lies in shared memory, so that any worker can go on with it",
            )
    return items
