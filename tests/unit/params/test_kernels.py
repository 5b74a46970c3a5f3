"""Steps without torch's own around them, against those with it: the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from paceline.params import kernels
from paceline.params.rows import Rows, add, gradient_of

KNOWN: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.01, maximize=True, fused=True),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), fused=True),
    "adam, decoupled": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, fused=True),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, maximize=True, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, eps=1e-3, fused=True),
}
UNKNOWN: dict[str, Callable[[Any], optim.Optimizer]] = {
    "not fused": lambda p: optim.AdamW(p, lr=0.01),
    "one group not fused": lambda p: optim.SGD([{"params": p[:1], "fused": True}, {"params": p[1:]}], lr=0.1),
    "another class": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
    "a class of the user's": lambda p: type("Own", (optim.AdamW,), {})(p, lr=0.01, fused=True),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in (200, 64, 7)]


def gradients(step: int, like: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in like]


def step_as_torch(optimizer: optim.Optimizer, tensors: list[torch.Tensor], step: int) -> None:
    for tensor, gradient in zip(tensors, gradients(step, tensors), strict=True):
        tensor.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_the_kernel_leaves_the_bits_of_the_step(name: str, *, in_groups: bool, dtype: torch.dtype) -> None:
    """After a first step by torch, which makes the state; the settings are changed on the way."""
    results = []
    for direct in (False, True):
        tensors = parameters(dtype)
        groups = [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.3}] if in_groups else tensors
        optimizer = KNOWN[name](groups)
        step_as_torch(optimizer, tensors, 0)
        kernel = kernels.find_kernel(optimizer)
        assert kernel is not None
        for step in range(1, 5):
            optimizer.param_groups[0]["lr"] *= 0.5
            optimizer.param_groups[0]["weight_decay"] += 0.1
            if direct:
                kernel(gradients(step, tensors))
            else:
                step_as_torch(optimizer, tensors, step)
        results.append([*tensors, *(v for t in tensors for v in optimizer.state[t].values() if v is not None)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_to_be_the_kernel_alone_has_none(name: str) -> None:
    tensors = parameters()
    optimizer = UNKNOWN[name](tensors)
    step_as_torch(optimizer, tensors, 0)
    assert kernels.find_kernel(optimizer) is None


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_there_is_no_kernel_before_all_tensors_have_state(name: str) -> None:
    tensors = parameters()
    optimizer = KNOWN[name](tensors)
    assert kernels.find_kernel(optimizer) is None


def test_an_optimizer_with_a_scale_of_a_scaler_has_none() -> None:
    tensors = parameters()
    optimizer = KNOWN["adamw"](tensors)
    step_as_torch(optimizer, tensors, 0)
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    assert kernels.find_kernel(optimizer) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_rows_are_added_as_sgd_steps_them(dtype: torch.dtype, *, maximize: bool) -> None:
    """Duplicates too. torch may multiply and add in one rounding, so the last bit may differ."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 16, generator=generator, dtype=dtype)
    indices = torch.randint(50, (200,), generator=generator)
    given = Rows(indices, torch.randn(200, 16, generator=generator, dtype=dtype), unique=False)
    oracle = copy.deepcopy(table)
    oracle.grad = gradient_of(given, oracle.shape)
    optimizer = optim.SGD([oracle], lr=0.1, maximize=maximize)
    rate = kernels.rate_of_rows(optimizer)
    assert rate is not None
    add(table, given, rate)
    optimizer.step()
    torch.testing.assert_close(table, oracle)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1),
        lambda p: optim.Adagrad(p, lr=0.1),
    ],
)
def test_steps_that_do_more_than_add_rows_are_left_to_torch(optimizer: Callable[[Any], optim.Optimizer]) -> None:
    assert kernels.rate_of_rows(optimizer([torch.zeros(4, 2)])) is None


BY_ROWS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sparse adam": lambda p: optim.SparseAdam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-3),
    "sparse adam, maximize": lambda p: optim.SparseAdam(p, lr=0.02, maximize=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1, eps=1e-3),
    "adagrad, maximize": lambda p: optim.Adagrad(p, lr=0.1, maximize=True),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [1, 7, 16, 100])
@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_are_stepped_with_the_bits_of_torch(name: str, row: int, dtype: torch.dtype) -> None:
    """After a first step by torch, which makes the state; among the gradients one of no rows, and rows of zeros."""
    results = []
    for direct in (False, True):
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(300, row, generator=generator, dtype=dtype)
        optimizer = BY_ROWS[name]([table])
        for step in range(5):
            indices = torch.randint(0, 300, (0 if step == 3 else 120,), generator=generator).unique()
            given = Rows(indices, torch.randn(len(indices), row, generator=generator, dtype=dtype))
            given.values[:9] = 0.0
            if step == 4:
                optimizer.param_groups[0]["lr"] = 0.3
            if not direct or step == 0:
                table.grad = gradient_of(given, table.shape)
                optimizer.step()
            else:
                assert kernels.step_rows(optimizer, given)
        results.append([table, *optimizer.state[table].values()])
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "unique", "dtype"),
    [
        (lambda p: optim.SparseAdam(p), True, torch.float32),
        (lambda p: optim.Adagrad(p), False, torch.float32),
        (lambda p: optim.Adagrad(p), True, torch.bfloat16),
        (lambda p: optim.SGD(p, lr=0.1), True, torch.float32),
        (lambda p: type("Own", (optim.Adagrad,), {})(p), True, torch.float32),
        (lambda p: optim.Adagrad(p, weight_decay=0.1), True, torch.float32),
    ],
    ids=["no state yet", "with duplicates", "of 16 bits", "another class", "a class of the user's", "weight decay"],
)
def test_rows_that_are_not_known_how_to_be_stepped_are_left_to_torch(
    optimizer: Callable[[Any], optim.Optimizer], unique: bool, dtype: torch.dtype
) -> None:
    table = torch.zeros(4, 2, dtype=dtype)
    given = Rows(torch.tensor([1]), torch.ones(1, 2, dtype=dtype), unique)
    assert not kernels.step_rows(optimizer([table]), given)
    assert not table.any()


def test_hooks_for_all_optimizers_are_called() -> None:
    tensors = parameters()
    optimizer = KNOWN["adamw"](tensors)
    step_as_torch(optimizer, tensors, 0)
    told: list[optim.Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda one, *_: told.append(one))
    try:
        assert kernels.are_watched()
        kernels.bare_step(optimizer)()
        assert told == [optimizer]
        assert kernels.rate_of_rows(optim.SGD([torch.zeros(4, 2)], lr=0.1)) is None
    finally:
        handle.remove()
    assert not kernels.are_watched()
