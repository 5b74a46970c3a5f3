"""What is known of optimizer classes: their state, their settings, their clones, and those that cannot be shared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import optim

from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.optimizers import StateItem
from paceline.params.table import Table, tabulate

Made = Callable[[Any], optim.Optimizer]

# class -> how to make one that keeps all the state it can
KINDS: dict[str, Made] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.5),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adamax": lambda p: optim.Adamax(p),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Rprop": lambda p: optim.Rprop(p),
    "Adafactor": lambda p: optim.Adafactor(p),
}
if hasattr(optim, "Muon"):
    KINDS["Muon"] = lambda p: optim.Muon(p)  # matrices only
WHOLE = {"Adafactor", "Muon"}
REFUSED = {"LBFGS", "SparseAdam"}


def parameters(kind: str) -> list[torch.Tensor]:
    """A matrix, and what else the class takes."""
    shapes = [(4, 3), (2, 5)] if kind == "Muon" else [(4, 3), (5,), (1,), ()]
    found = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def table_of(optimizer: optim.Optimizer) -> Table:
    numbered = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
    return tabulate((f"p{i}", g, p.detach()) for i, (g, p) in enumerate(numbered))


def described(optimizer: optim.Optimizer) -> tuple[StateItem, ...]:
    kind = type(optimizer)
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    return optimizers.describe_state(
        table_of(optimizer),
        optimizers.decode(optimizers.encode(optimizers.settings(optimizer))),
        lambda groups: optimizers.clone(vars(optimizer), kind, groups),
        [optimizer.state.get(p) or {} for p in flat],
        elementwise=optimizers.is_elementwise(kind),
    )


def test_every_class_of_torch_is_known_or_refused() -> None:
    classes = {name for name in dir(optim) if isinstance(getattr(optim, name), type)} - {"Optimizer"}
    assert classes == {*KINDS, *REFUSED}, "a class of torch.optim is neither in the tests nor refused"


@pytest.mark.parametrize("name", KINDS)
def test_only_classes_that_step_values_apart_are_cut_within_parameters(name: str) -> None:
    """Stepping two halves is stepping the whole, for exactly the classes said to be elementwise."""
    kind = getattr(optim, name)
    assert optimizers.is_elementwise(kind) is (name not in WHOLE)
    if name in WHOLE:
        return
    torch.manual_seed(0)
    whole = torch.randn(128, dtype=torch.float64)
    halves = [whole[:64].clone(), whole[64:].clone()]
    one, two = KINDS[name]([whole]), KINDS[name](halves)
    for _ in range(4):
        whole.grad = torch.randn(128, dtype=torch.float64)
        for half, part in zip(halves, (whole.grad[:64], whole.grad[64:]), strict=True):
            half.grad = part.clone()
        one.step()
        two.step()
    assert torch.equal(whole, torch.cat(halves))


def test_a_subclass_may_do_anything() -> None:
    class Mine(optim.SGD):
        pass

    assert not optimizers.is_elementwise(Mine)


# --- state ---


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("stepped", [False, True])
def test_what_a_class_keeps_is_found_before_and_after_its_first_step(name: str, stepped: bool) -> None:
    """The oracle is the class itself: keys, dtypes and shapes as they are after a real step."""
    torch.manual_seed(0)
    asked = KINDS[name](parameters(name))
    if stepped:
        asked.step()
    items = described(asked)
    torch.manual_seed(0)
    real = KINDS[name](parameters(name))
    real.step()
    flat = [p for group in real.param_groups for p in group["params"]]
    expected = {}
    for index, parameter in enumerate(flat):
        for key, value in real.state[parameter].items():
            if value is not None:
                expected[index, key] = value
    assert {(item.param, item.key) for item in items} == set(expected)
    for item in items:
        value = expected[item.param, item.key]
        if isinstance(value, torch.Tensor):
            assert getattr(torch, item.dtype) == value.dtype
            assert item.shape == tuple(value.shape)
            numbers = (
                SCALARS if name not in WHOLE else ("step", "variance") if flat[item.param].ndim == 0 else ("step",)
            )
            assert (item.kind == "like") is (value.shape == flat[item.param].shape and item.key not in numbers)
        else:
            assert item.kind == {int: "int", float: "float", bool: "int"}[type(value)]


SCALARS = ("step", "eta", "mu", "mu_product")  # one number a parameter, also of a parameter that is one number


def test_settings_decide_what_is_kept() -> None:
    plain = optim.SGD(parameters("SGD"), lr=0.1)
    assert described(plain) == ()
    groups = [{"params": [p], "momentum": m} for p, m in zip(parameters("SGD"), (0.0, 0.9, 0.0, 0.5), strict=True)]
    mixed = optim.SGD(groups, lr=0.1)
    assert [(item.param, item.key) for item in described(mixed)] == [(1, "momentum_buffer"), (3, "momentum_buffer")]


def test_asking_changes_nothing_of_the_users() -> None:
    torch.manual_seed(0)
    given_ = parameters("AdamW")
    optimizer = optim.AdamW(given_)
    before = (
        [p.detach().clone() for p in given_],
        [p.grad.clone() for p in given_],
        copy.deepcopy(optimizer.state_dict()),
    )
    described(optimizer)
    assert all(torch.equal(p, was) for p, was in zip(given_, before[0], strict=True))
    assert all(torch.equal(p.grad, was) for p, was in zip(given_, before[1], strict=True))
    assert optimizer.state_dict() == before[2]
    assert not optimizer.state


def test_a_fused_kernels_step_is_float32_whatever_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        items = described(optim.AdamW(parameters("AdamW"), fused=True))
    finally:
        torch.set_default_dtype(before)
    assert {item.dtype for item in items if item.key == "step"} == {"float32"}


class Odd(optim.Optimizer):
    """Keeps a Python int, a float, and a tensor of a shape of its own."""

    def __init__(self, params: Any, extra: Any = None) -> None:
        self.extra = extra
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["rate"] = 0.5
                state["rows"] = torch.zeros(p.shape[:1])
                state["nothing"] = None
                if self.extra is not None:
                    state["extra"] = self.extra


def test_numbers_and_tensors_of_any_shape_are_kept_by_unknown_classes() -> None:
    optimizer = Odd([torch.zeros(4, 3)])
    assert described(optimizer) == (
        StateItem(0, "count", "int", "float64", ()),
        StateItem(0, "rate", "float", "float64", ()),
        StateItem(0, "rows", "tensor", "float32", (4,)),
    )


def test_state_that_cannot_be_shared_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match="the optimizer keeps 'extra' as list; state must be tensors and numbers"):
        described(Odd([torch.zeros(4, 3)], extra=[1, 2]))


def test_lbfgs_is_refused_with_another_to_take() -> None:
    with pytest.raises(ConfigError, match="LBFGS") as caught:
        optimizers.check(optim.LBFGS([torch.zeros(1)]))
    assert "Adam" in caught.value.fix


def test_sparse_adam_of_a_dense_parameter_is_refused_by_its_name() -> None:
    optimizer = optim.SparseAdam([torch.zeros(4, 2), torch.zeros(5)])
    table, bias = optimizer.param_groups[0]["params"]
    both = tabulate([("table", 0, table), ("bias", 0, bias)], {id(table)})
    with pytest.raises(ConfigError, match="SparseAdam has bias, whose gradient is exchanged dense") as caught:
        optimizers.check_rows(optimizer, both)
    assert "Adam for the other parameters" in caught.value.fix
    optimizers.check_rows(optimizer, tabulate([("table", 0, table)], {id(table)}))


BY_ROWS: dict[str, tuple[Callable[[Any], optim.Optimizer], bool]] = {
    "SGD": (lambda p: optim.SGD(p, lr=0.1), True),
    "SGD foreach": (lambda p: optim.SGD(p, lr=0.1, foreach=True), True),
    "SGD with momentum": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), False),
    "Adagrad": (lambda p: optim.Adagrad(p, lr=0.1), True),
    "SparseAdam": (lambda p: optim.SparseAdam(p), True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_rows_are_stepped_by_the_classes_that_keep_dense_state_for_them(name: str, dtype: torch.dtype) -> None:
    """SGD's momentum would be a sparse tensor that grows: such gradients are exchanged dense."""
    make, expected = BY_ROWS[name]
    table = torch.zeros(4, 2, dtype=dtype)
    optimizer = make([table])
    group = optimizers.settings(optimizer)[0]
    before = copy.deepcopy(optimizer.state[table])
    assert optimizers.takes_rows(optimizer, table, group) is expected
    assert optimizer.state[table].keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[table].items())
    for row in (1, 3):
        gradient = torch.zeros(4, 2, dtype=dtype)
        gradient[row] = 1.0
        table.grad = gradient.to_sparse(1)
        optimizer.step()
    assert optimizers.takes_rows(optimizer, table, group) is expected, "after steps alone the answer is another"


REFUSES_ROWS: dict[str, Callable[[Any], optim.Optimizer]] = {
    **{name: KINDS[name] for name in KINDS if name not in ("SGD", "Adagrad")},
    "SGD with weight decay": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1),
    "Adagrad with weight decay": lambda p: optim.Adagrad(p, weight_decay=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, fused=True),
}


@pytest.mark.parametrize("name", REFUSES_ROWS)
def test_what_torch_does_not_step_by_rows_is_refused_with_what_to_take(name: str) -> None:
    table = torch.zeros(4, 2)
    optimizer = REFUSES_ROWS[name]([table])
    with pytest.raises(ConfigError, match="does not step the sparse gradients of an embedding") as caught:
        optimizers.takes_rows(optimizer, table, optimizers.settings(optimizer)[0])
    assert type(optimizer).__name__ in caught.value.what
    assert "SparseAdam" in caught.value.fix


@pytest.mark.parametrize("name", KINDS)
def test_the_others_are_not_refused(name: str) -> None:
    optimizers.check(KINDS[name](parameters(name)))


# --- settings ---

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.text(max_size=5)
)
NAMES = st.text(max_size=8).filter(lambda name: name not in ("params", "param_names"))
SETTINGS = st.dictionaries(NAMES, PLAIN | st.lists(PLAIN, max_size=3).map(tuple), max_size=5)


@given(st.lists(SETTINGS, max_size=3))
def test_settings_come_back_from_the_wire_tuples_included(groups: list[dict[str, Any]]) -> None:
    optimizer = optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups = [{"params": [], "param_names": [], **group} for group in groups]
    assert optimizers.decode(optimizers.encode(optimizers.settings(optimizer))) == groups


@pytest.mark.parametrize("name", KINDS)
def test_every_class_steps_with_settings_from_the_wire(name: str) -> None:
    torch.manual_seed(0)
    mine = KINDS[name](parameters(name))
    torch.manual_seed(0)
    its = KINDS[name](parameters(name))
    for group, wired in zip(
        its.param_groups, optimizers.decode(optimizers.encode(optimizers.settings(its))), strict=True
    ):
        assert {key: value for key, value in group.items() if key != "params"} == wired
        group.update(wired)
    mine.step()
    its.step()
    pairs = zip(mine.param_groups[0]["params"], its.param_groups[0]["params"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


NUMBERS = {
    "tensor": torch.tensor(0.25),
    "numpy float64": np.float64(0.25),  # what a schedule written with np.cos leaves in a group
    "numpy float32": np.float32(0.25),
    "numpy array of no dimension": np.array(0.25),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_kinds_travel_as_numbers(kind: str) -> None:
    optimizer = optim.AdamW([torch.zeros(1)])
    optimizer.param_groups[0] |= {"lr": NUMBERS[kind], "betas": (NUMBERS[kind], 0.999)}
    (wired,) = optimizers.decode(optimizers.encode(optimizers.settings(optimizer)))
    assert (wired["lr"], wired["betas"]) == (0.25, (0.25, 0.999))


def test_a_whole_number_of_numpy_stays_whole() -> None:
    optimizer = optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups[0]["every"] = np.int64(7)
    (wired,) = optimizers.decode(optimizers.encode(optimizers.settings(optimizer)))
    assert wired["every"] == 7
    assert isinstance(wired["every"], int)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-300])
def test_extreme_rates_travel(value: float) -> None:
    optimizer = optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups[0]["lr"] = value
    assert optimizers.decode(optimizers.encode(optimizers.settings(optimizer)))[0]["lr"] == value


@pytest.mark.parametrize(
    "value",
    [object(), lambda step: step, 2**80, torch.zeros(2)],
    ids=["an object", "a function", "a number of 80 bits", "a tensor of two values"],
)
def test_a_setting_that_cannot_travel_is_a_config_error(value: Any) -> None:
    optimizer = optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.param_groups[0]["mine"] = value
    with pytest.raises(ConfigError, match="a setting that cannot be sent"):
        optimizers.encode(optimizers.settings(optimizer))


# --- clones ---


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("as_server", [False, True])
def test_a_clone_steps_as_the_original_and_shares_nothing_with_it(name: str, as_server: bool) -> None:
    torch.manual_seed(0)
    mine = KINDS[name](parameters(name))
    wired = optimizers.decode(optimizers.encode(optimizers.settings(mine)))
    others = [p.detach().clone().requires_grad_() for p in mine.param_groups[0]["params"]]
    source = {} if as_server else vars(mine)
    clone = optimizers.clone(source, type(mine), [{**wired[0], "params": others}])
    assert type(clone) is type(mine)
    assert not clone.state
    before = copy.deepcopy(mine.state_dict()), [p.detach().clone() for p in mine.param_groups[0]["params"]]
    gradients = [[torch.randn_like(p) for p in others] for _ in range(3)]
    for step in gradients:
        for p, gradient in zip(others, step, strict=True):
            p.grad = gradient.clone()
        if name != "Adagrad" or clone.state:  # Adagrad makes its state when constructed; a shard brings it
            clone.step()
        else:
            for p in others:
                clone.state[p] = copy.deepcopy(mine.state[mine.param_groups[0]["params"][len(clone.state)]])
            clone.step()
    assert mine.state_dict()["param_groups"] == before[0]["param_groups"]
    assert all(torch.equal(p, was) for p, was in zip(mine.param_groups[0]["params"], before[1], strict=True))
    for step in gradients:
        for p, gradient in zip(mine.param_groups[0]["params"], step, strict=True):
            p.grad = gradient.clone()
        mine.step()
    assert all(torch.equal(p, other) for p, other in zip(mine.param_groups[0]["params"], others, strict=True))


def test_a_clone_has_none_of_the_originals_hooks_and_no_replaced_step() -> None:
    called = []
    mine = optim.SGD([torch.zeros(1)], lr=0.1)
    mine.register_step_pre_hook(lambda *_: called.append("pre"))
    mine.register_step_post_hook(lambda *_: called.append("post"))
    mine.register_state_dict_pre_hook(lambda *_: called.append("state"))
    mine.step = lambda closure=None: called.append("step")  # type: ignore[method-assign]  # what wrap does
    clone = optimizers.clone(vars(mine), type(mine), [{**mine.param_groups[0], "params": [torch.zeros(1)]}])
    clone.step()
    clone.state_dict()
    assert called == []


def test_hooks_of_a_clone_are_its_own() -> None:
    mine = optim.SGD([torch.zeros(1)], lr=0.1)
    clone = optimizers.clone(vars(mine), type(mine), [{**mine.param_groups[0], "params": [torch.zeros(1)]}])
    clone.register_step_pre_hook(lambda *_: None)
    assert not mine._optimizer_step_pre_hooks


def test_a_clone_has_the_attributes_a_class_of_the_users_needs() -> None:
    mine = Odd([torch.zeros(4, 3)], extra=2.5)
    other = torch.zeros(4, 3)
    clone = optimizers.clone(vars(mine), Odd, [{"lr": 0.1, "params": [other]}])
    clone.step()
    assert clone.state[other]["extra"] == 2.5


# --- classes by name ---


@pytest.mark.parametrize("name", KINDS)
def test_a_server_finds_the_class_by_its_path(name: str) -> None:
    kind = getattr(optim, name)
    assert optimizers.find_class(optimizers.class_path(kind)) is kind


def test_a_class_within_a_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "Outer", type("Outer", (), {"Inner": optim.SGD}), raising=False)
    assert optimizers.find_class("torch.optim:Outer.Inner") is optim.SGD


@pytest.mark.parametrize(
    "path",
    [
        "__main__:Mine",
        "no_such_module_here:Mine",
        "torch.optim:NoSuchClass",
        "torch.optim:lr_scheduler",
        "torch.optim:make.<locals>.Mine",
    ],
)
def test_a_class_that_cannot_be_imported_is_a_config_error(path: str) -> None:
    with pytest.raises(ConfigError, match="where a server cannot import it") as caught:
        optimizers.find_class(path)
    assert "--servers 0" in caught.value.fix


# --- fused kernels ---


@pytest.mark.parametrize(
    ("kind", "group", "dtypes", "device", "chosen"),
    [
        (optim.AdamW, {}, [torch.float32], "cpu", True),
        (optim.SGD, {"fused": None, "foreach": None}, [torch.float32, torch.float64], "cpu", True),
        (optim.AdamW, {"fused": False}, [torch.float32], "cpu", False),
        (optim.AdamW, {"foreach": True}, [torch.float32], "cpu", False),
        (optim.AdamW, {"foreach": False}, [torch.float32], "cpu", False),
        (optim.AdamW, {"capturable": True}, [torch.float32], "cpu", False),
        (optim.AdamW, {"differentiable": True}, [torch.float32], "cpu", False),
        (optim.AdamW, {}, [torch.float32, torch.bfloat16], "cpu", False),
        (optim.AdamW, {}, [torch.float16], "cpu", False),
        (optim.AdamW, {}, [torch.complex64], "cpu", False),
        (optim.AdamW, {}, [torch.float32], "cuda", False),
        (optim.SGD, {"momentum": 0.9, "dampening": 0.1}, [torch.float32], "cpu", False),
        (optim.RMSprop, {}, [torch.float32], "cpu", False),
        (type("Mine", (optim.AdamW,), {}), {}, [torch.float32], "cpu", False),
    ],
)
def test_the_fused_kernel_is_chosen_where_there_is_one_and_nothing_speaks_against_it(
    kind: type, group: dict[str, Any], dtypes: list[torch.dtype], device: str, chosen: bool
) -> None:
    assert optimizers.choose_fused(kind, group, dtypes, torch.device(device)) is chosen
