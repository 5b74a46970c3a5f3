"""Shards against their oracles: the weighted mean in float64, and torch's own optimizer over the whole parameters."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import optim

from paceline.params import optimizers
from paceline.params.chunk import Target
from paceline.params.shard import Shard
from paceline.params.state import State, StatePlan
from paceline.params.table import DTYPES, Entry, Table, tabulate
from paceline.protocol.partition import Piece, deal, grid

Vectors = dict[str, torch.Tensor]

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "fused momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "unfused momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "fused adamw": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "foreach adam": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "asgd": lambda p: optim.ASGD(p, t0=1),
    "rprop": lambda p: optim.Rprop(p),
    "adafactor": lambda p: optim.Adafactor(p),
}
SHAPES: list[tuple[int, ...]] = [(70, 3), (5,), (), (0,), (130,), (64,)]
NO_EMPTY = [(70, 3), (5,), (), (1,), (130,), (64,)]  # torch's Adafactor divides by the number of values


def start(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    return tensors(dtype, seed, NO_EMPTY if name == "adafactor" else SHAPES)


class Job:
    """Parameters and state in plain memory, stepped by shards; ``optimizer`` is the user's, for the oracle too."""

    def __init__(
        self,
        make: Callable[[Any], optim.Optimizer],
        tensors: Sequence[torch.Tensor],
        *,
        cut_into: int = 1,
        block: int = 64,
        chunk_bytes: int = 1500,
    ) -> None:
        self.parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
        self.optimizer = make(self.parameters)
        kind = type(self.optimizer)
        groups = self.optimizer.param_groups
        index = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
        self.table = tabulate((f"p{i}", index[id(p)], p.detach()) for i, p in enumerate(self.parameters))
        self.whole = not optimizers.is_elementwise(kind)
        self.groups = optimizers.decode(optimizers.encode(optimizers.settings(self.optimizer)))
        self.make = lambda asked: optimizers.clone(vars(self.optimizer), kind, asked)
        items = optimizers.describe_state(
            self.table,
            self.groups,
            self.make,
            [self.optimizer.state.get(p) or {} for p in self.parameters],
            elementwise=not self.whole,
        )
        sizes = [entry.size for entry in self.table.entries]
        self.blocks, self.chunk_bytes = grid(sizes, cut_into, most=block, whole=self.whole), chunk_bytes
        plan = StatePlan(self.table, items, self.blocks)
        memory = torch.zeros(max(plan.size_bytes, 1), dtype=torch.uint8)
        self.state = State(self.table, plan, lambda dtype, at, n: memory[at : at + n * dtype.itemsize].view(dtype))
        self.vectors = vectors_of(self.table, [p.detach() for p in self.parameters])
        for number, parameter in enumerate(self.parameters):
            own = self.optimizer.state.get(parameter)
            if own:
                self.state.fill(number, dict(own))

    def shards(self, parts: int) -> list[Shard]:
        """One a part, with the state as it is."""
        groups = copy.deepcopy(self.groups)
        target = Target(self.table, self.vectors, self.state, self.make, groups, whole=self.whole)
        made = [Shard(target, share, self.chunk_bytes) for share in deal(self.blocks, parts)]
        for shard in made:
            shard.resume()
        return made

    def values(self) -> list[torch.Tensor]:
        return [self.table.view(entry, self.vectors[entry.dtype]).clone() for entry in self.table.entries]


def vectors_of(table: Table, tensors: Sequence[torch.Tensor]) -> Vectors:
    """Flat vectors, by dtype, that hold these tensors."""
    vectors = {dtype: torch.zeros(size, dtype=DTYPES[dtype]) for dtype, size in table.sizes.items()}
    for entry, tensor in zip(table.entries, tensors, strict=True):
        table.view(entry, vectors[entry.dtype]).copy_(tensor)
    return vectors


def tensors(
    dtype: torch.dtype = torch.float64, seed: int = 0, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@dataclass
class Given:
    """What a worker has pushed."""

    gradient: Vectors
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


def step_all(
    shards: Sequence[Shard], gradients: list[Vectors], weights: list[float], mask: bytes | None = None
) -> None:
    for shard in shards:
        shard.fold([Given(gradient) for gradient in gradients], weights)
        shard.step(None, mask)


def assert_same_bits(mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    for number, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert torch.equal(a, b), f"parameter {number} differs"


def all_state(job: Job) -> list[dict[str, Any]]:
    return [copy.deepcopy(job.state.view(param)) for param in range(len(job.parameters))]


def assert_same_state(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(mine, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


# --- the fold ---

WEIGHTS = st.lists(st.one_of(st.integers(1, 1000).map(float), st.floats(1e-3, 1e3)), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(1, 9), st.integers(0, 2**30))
def test_the_fold_is_the_mean_weighted_by_samples(weights: list[float], parts: int, seed: int) -> None:
    """SGD with a rate of 1 on zeros shows the folded gradient: w = -g. The oracle is float64 arithmetic."""
    shapes = [(70, 3), (130,), (), (0, 2)]
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(shape, dtype=torch.float64) for shape in shapes])
    given_ = [tensors(seed=seed + worker, shapes=shapes) for worker in range(len(weights))]
    step_all(job.shards(parts), [vectors_of(job.table, one) for one in given_], weights)
    for number, found in enumerate(job.values()):
        stacked = torch.stack([one[number] for one in given_])
        share = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
        expected = -(share.view(-1, *[1] * found.ndim) * stacked).sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_one_contributor_is_folded_without_a_rounding() -> None:
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(100)])
    (gradient,) = tensors(torch.float32, shapes=[(100,)])
    step_all(job.shards(3), [vectors_of(job.table, [gradient])], [17.0])
    assert_same_bits(job.values(), [-gradient])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """100 + 99 times 0.25 in bfloat16 stays at 100: the sum would lose every later contributor."""
    workers = 100
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(130, dtype=dtype)])
    values = [100.0] + [0.25] * (workers - 1)
    gradients = [vectors_of(job.table, [torch.full((130,), value, dtype=dtype)]) for value in values]
    step_all(job.shards(2), gradients, [1.0] * workers)
    expected = -torch.tensor(sum(values) / workers).to(dtype)
    torch.testing.assert_close(job.values()[0], expected.expand(130), rtol=torch.finfo(dtype).eps, atol=0.0)
    stepwise = torch.zeros((), dtype=dtype)
    for value in values:
        stepwise += torch.tensor(value / workers, dtype=dtype)
    assert abs(float(stepwise) + float(expected)) > 2 * torch.finfo(dtype).eps  # the test would notice


def test_complex_gradients_are_folded() -> None:
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(3, dtype=torch.complex128)])
    gradients = [torch.full((3,), value, dtype=torch.complex128) for value in (1 + 2j, 4 - 1j)]
    step_all(job.shards(1), [vectors_of(job.table, [one]) for one in gradients], [2.0, 1.0])
    torch.testing.assert_close(job.values()[0], torch.full((3,), -2 - 1j, dtype=torch.complex128))


# --- the step ---


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_step_as_the_optimizer_does(name: str) -> None:
    job, alone = Job(OPTIMIZERS[name], start(name)), Job(OPTIMIZERS[name], start(name))
    shards = job.shards(3)
    for step in range(5):
        gradients = [start(name, seed=step * 10 + worker + 1) for worker in range(2)]
        step_all(shards, [vectors_of(job.table, one) for one in gradients], [3.0, 1.0])
        for parameter, a, b in zip(alone.parameters, *gradients, strict=True):
            parameter.grad = 0.75 * a + 0.25 * b
        alone.optimizer.step()
    for mine, other in zip(job.values(), alone.parameters, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_partition_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    results = []
    for parts in (1, 2, 3, 7, 20):
        job = Job(OPTIMIZERS[name], start(name, dtype), cut_into=parts, block=64 * parts, chunk_bytes=1 << parts)
        shards = job.shards(parts)
        for step in range(3):
            gradients = [vectors_of(job.table, start(name, dtype, step * 10 + worker + 1)) for worker in range(3)]
            step_all(shards, gradients, [8.0, 8.0, 3.0])
        results.append((job.values(), all_state(job)))
    for values, state in results[1:]:
        assert_same_bits(values, results[0][0])
        assert_same_state(state, results[0][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shares_may_move_between_any_two_steps(name: str) -> None:
    """Each step is divided anew, with shards that were used before or never; all resume before anyone steps."""
    still, moving = Job(OPTIMIZERS[name], start(name)), Job(OPTIMIZERS[name], start(name))
    fixed = still.shards(1)
    known = {parts: moving.shards(parts) for parts in (1, 2, 3)}
    random_ = random.Random(name)
    for step in range(8):
        gradients = [vectors_of(still.table, start(name, seed=step * 10 + worker + 1)) for worker in range(2)]
        step_all(fixed, gradients, [1.0, 2.0])
        shards = known[random_.choice((1, 2, 3))]
        for shard in shards:
            shard.resume()
        step_all(shards, gradients, [1.0, 2.0])
    assert_same_bits(moving.values(), still.values())
    assert_same_state(all_state(moving), all_state(still))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_gradient_leaves_parameter_and_state_untouched(name: str, parts: int) -> None:
    """As in torch, where ``grad is None`` is not a gradient of zero: no decay, no moment, no count."""
    plain = "unfused momentum" if name == "fused momentum" else name  # torch's own fused SGD wants gradients for all
    job, alone = Job(OPTIMIZERS[name], start(name)), Job(OPTIMIZERS[plain], start(name))
    shards = job.shards(parts)
    masks = [b"\1\0\1\1\1\1", b"\0\1\1\1\1\0", b"\1\1\1\1\1\1", b"\0\0\0\0\0\0"]
    for step, mask in enumerate(masks):
        before, state = job.values(), all_state(job)
        gradients = [start(name, seed=step * 10 + worker + 1) for worker in range(2)]
        step_all(shards, [vectors_of(job.table, one) for one in gradients], [1.0, 1.0], mask)
        for param, had in enumerate(mask):
            if not had:
                assert_same_bits(job.values()[param : param + 1], before[param : param + 1])
                assert_same_state(all_state(job)[param : param + 1], state[param : param + 1])
        for parameter, had, a, b in zip(alone.parameters, mask, *gradients, strict=True):
            parameter.grad = 0.5 * a + 0.5 * b if had else None
        alone.optimizer.step()
    for mine, other in zip(job.values(), alone.parameters, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-12, atol=1e-12)


def test_new_settings_hold_from_their_step_on() -> None:
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(3)])
    shards = job.shards(2)
    gradients = [Given(vectors_of(job.table, [torch.ones(3)]))]
    for settings_, expected in ((None, -1.0), ([{"lr": 10.0}], -11.0), (None, -21.0)):
        for shard in shards:
            shard.fold(gradients, [1.0])
            shard.step(settings_, None)
        assert job.values()[0].tolist() == [expected] * 3


def test_groups_have_their_own_settings() -> None:
    def make(parameters: Any) -> optim.Optimizer:
        return optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 5.0}])

    job = Job(make, [torch.zeros(70), torch.zeros(70)])
    step_all(job.shards(3), [vectors_of(job.table, [torch.ones(70), torch.ones(70)])], [1.0])
    assert [value[0].item() for value in job.values()] == [-1.0, -5.0]


def test_mixed_dtypes_step_side_by_side() -> None:
    zeros = [
        torch.zeros(70),
        torch.zeros(70, dtype=torch.bfloat16),
        torch.zeros(70),
        torch.zeros(3, dtype=torch.float64),
    ]
    job = Job(lambda p: optim.SGD(p, lr=1.0), zeros)
    gradients = [torch.full_like(one, number + 1.0) for number, one in enumerate(zeros)]
    for parts in (1, 2, 5):
        step_all(job.shards(parts), [vectors_of(job.table, gradients)], [1.0])
    assert [value[-1].item() for value in job.values()] == [-3.0, -6.0, -9.0, -12.0]
    assert [value.dtype for value in job.values()] == [one.dtype for one in zeros]


def test_padding_stays_zero() -> None:
    """What lies between parameters is stepped with them; it must not grow to anything that a kernel stumbles on."""
    job = Job(OPTIMIZERS["adamw"], [torch.ones(3), torch.ones(65)])
    shards = job.shards(2)
    for _ in range(3):
        step_all(shards, [vectors_of(job.table, [torch.ones(3), torch.ones(65)])], [1.0])
    vector = job.vectors["float32"]
    assert torch.count_nonzero(vector) == 68
    assert torch.isfinite(vector).all()


def test_a_shards_memory_does_not_grow_with_a_table() -> None:
    """A table of 2^40 rows that exists nowhere: what is folded and stepped is the one row of the gradient."""
    row, rows = 2, 1 << 40
    vector = torch.zeros(1).expand(rows * row)
    table = Table((Entry("table", (rows, row), (row, 1), "float32", 0, 0, rows * row, row),), {"float32 rows": 0})
    piece = Piece(0, (rows // 2) * row, rows * row)
    plan = StatePlan(table, (), [piece])
    state = State(table, plan, lambda dtype, at, n: torch.zeros(n, dtype=dtype))
    stepped: list[torch.Tensor] = []

    class Seen(optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            stepped.extend(p.grad for p in self.param_groups[0]["params"])

    vectors = {"float32 rows": vector}
    target = Target(table, vectors, state, lambda groups: optimizers.clone({}, Seen, groups), [{}], whole=False)
    shard = Shard(target, [piece])
    indices = torch.tensor([2, 1, rows - 3, 0])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).as_strided((4,), (1,))
    pushed = Given({"float32 rows": values}, {0: indices})
    shard.fold([pushed, pushed], [1.0, 3.0])
    shard.step(None, None)
    assert stepped[0].indices().tolist() == [[rows // 2 - 3]]
    assert stepped[0].values().tolist() == [[3.0, 4.0]]
    assert shard.norm(None, 2.0) == 25.0


@pytest.mark.parametrize("factors", [[0.5], [0.5, 0.5], [0.5, 0.25], [1.0, 0.1, 0.1], [0.3] * 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_each_has_pushed_counts_by_its_factor(dtype: torch.dtype, factors: list[float]) -> None:
    weights = [1.0, 3.0, 2.0][: len(factors)]
    job, expected = Job(OPTIMIZERS["sgd"], tensors(dtype)), Job(OPTIMIZERS["sgd"], tensors(dtype))
    gradients = [vectors_of(job.table, tensors(dtype, seed=worker)) for worker in range(len(factors))]
    for shard in job.shards(2):
        shard.fold([Given(gradient) for gradient in gradients], weights, factors)
        shard.step(None, None)
    scaled = [{k: v * f for k, v in one.items()} for one, f in zip(gradients, factors, strict=True)]
    step_all(expected.shards(2), scaled, weights)
    for vector, values in job.vectors.items():
        torch.testing.assert_close(values, expected.vectors[vector])


@settings(max_examples=50)
@given(st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.integers(0, 2**30))
def test_parts_of_a_norm_add_up_to_the_norm_of_the_fold(parts: int, order: float, seed: int) -> None:
    job = Job(OPTIMIZERS["sgd"], tensors())
    given_ = [tensors(seed=seed + worker) for worker in range(2)]
    chosen = bytes(random.Random(seed).choice((0, 1)) for _ in SHAPES)
    found = []
    for shard in job.shards(parts):
        shard.fold([Given(vectors_of(job.table, one)) for one in given_], [3.0, 1.0])
        found.append(shard.norm(chosen, order))
    folded = [0.75 * a + 0.25 * b for a, b, had in zip(*given_, chosen, strict=True) if had]
    flat = torch.cat([one.flatten() for one in folded]) if folded else torch.zeros(1, dtype=torch.float64)
    expected = float(torch.linalg.vector_norm(flat, order)) if flat.numel() else 0.0
    total = max(found) if order == math.inf else math.fsum(found) ** (1 / order)
    assert total == pytest.approx(expected, rel=1e-12)


# --- parts of a fixed cut, each stepped by turns ---


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_part_is_stepped_by_any_process_in_its_turn(name: str, parts: int) -> None:
    """Three processes follow one another at each part in an order of its own; every part sees all gradients in the same
    order. The oracle has one process and one part."""
    job, alone = Job(OPTIMIZERS[name], start(name), cut_into=parts), Job(OPTIMIZERS[name], start(name))
    processes, whole = [job.shards(parts) for _ in range(3)], alone.shards(1)
    gradients = [vectors_of(job.table, start(name, seed=step + 1)) for step in range(8)]
    for gradient in gradients:
        step_all(whole, [gradient], [1.0])
    random_ = random.Random(name)
    for part in range(parts):
        for gradient in gradients:
            shard = random_.choice(processes)[part]
            shard.follow()
            shard.fold([Given(gradient)], [4.0])
            shard.step(None, None)
    assert_same_bits(job.values(), alone.values())
    assert_same_state(all_state(job), all_state(alone))


@pytest.mark.parametrize("name", ["momentum", "adamw", "nadam", "adafactor", "asgd"])
def test_a_state_that_was_replaced_is_followed_after_it_is_forgotten(name: str) -> None:
    """As when a checkpoint is loaded over it: back to what it was before the last steps, or to none."""
    job, again = (Job(OPTIMIZERS[name], start(name), cut_into=2) for _ in range(2))
    (shards, others), expected = (job.shards(2), job.shards(2)), again.shards(2)
    gradients = [vectors_of(job.table, start(name, seed=step + 1)) for step in range(3)]

    def step(by: Sequence[Shard], gradient: Vectors) -> None:
        for shard in by:
            shard.follow()
        step_all(by, [gradient], [1.0])

    step(shards, gradients[0])
    saved = job.values(), all_state(job)
    step(others, gradients[1])
    step(shards, gradients[1])
    for number, (value, state) in enumerate(zip(*saved, strict=True)):
        entry = job.table.entries[number]
        job.table.view(entry, job.vectors[entry.dtype]).copy_(value)
        job.state.fill(number, state)
    for shard in (*shards, *others):
        shard.forget()
    step(others, gradients[2])
    step(shards, gradients[1])

    for gradient in (gradients[0], gradients[2], gradients[1]):
        step(expected, gradient)
    assert_same_bits(job.values(), again.values())
    assert_same_state(all_state(job), all_state(again))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_copied_to_where_they_belong_and_nothing_else_is(parts: int) -> None:
    shapes = [(70, 3), (5,), (), (0,), (130,), (64,)]
    values = [*tensors(shapes=shapes), *tensors(torch.float32, seed=1, shapes=[(200,), (3,)])]
    job = Job(OPTIMIZERS["sgd"], values)
    shards = job.shards(parts)
    for chosen in range(parts):
        copies = {dtype: torch.full_like(vector, 17.0) for dtype, vector in job.vectors.items()}
        shards[chosen].copy_to(copies)
        share = deal(job.blocks, parts)[chosen]
        expected = {dtype: torch.full_like(vector, 17.0) for dtype, vector in job.vectors.items()}
        for piece in share:
            entry = job.table.entries[piece.param]
            place = slice(entry.offset + piece.start, entry.offset + piece.stop)
            expected[entry.dtype][place] = job.vectors[entry.dtype][place]
        assert all(torch.equal(copies[dtype], expected[dtype]) for dtype in copies)
    copies = {dtype: torch.full_like(vector, 17.0) for dtype, vector in job.vectors.items()}
    for shard in shards:
        shard.copy_to(copies)
    assert all(torch.equal(copies[dtype], job.vectors[dtype]) for dtype in copies)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_one_contributors_gradient_is_stepped_where_it_lies(name: str) -> None:
    """Folded without a copy."""
    job = Job(OPTIMIZERS[name], start(name))
    slots = [vectors_of(job.table, start(name, seed=seed)) for seed in (1, 2)]
    shards = job.shards(2)
    for shard in shards:
        shard.fold([Given(slots[0])], [3.0])
    for vector in slots[0].values():
        vector.copy_(slots[1]["float64"])
    for shard in shards:
        shard.step(None, None)
    other = Job(OPTIMIZERS[name], start(name))
    step_all(other.shards(2), [slots[1]], [1.0])
    assert_same_bits(job.values(), other.values())


def test_the_gradients_of_several_slots_are_not_taken_for_one_another() -> None:
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(200, dtype=torch.float64)])
    slots = [vectors_of(job.table, [torch.full((200,), value, dtype=torch.float64)]) for value in (1.0, 10.0, 100.0)]
    shards = job.shards(3)
    for slot in (0, 1, 0, 2, 1):
        step_all(shards, [slots[slot]], [1.0])
    step_all(shards, slots[:2], [1.0, 1.0])
    step_all(shards, [slots[0]], [1.0])
    assert job.values()[0].tolist() == [-(1 + 10 + 1 + 100 + 10 + 5.5 + 1)] * 200


@given(st.integers(1, 5), st.floats(0, 2), st.integers(0, 2**30))
def test_a_gradient_is_compensated_for_what_has_come_since(parts: int, strength: float, seed: int) -> None:
    """Zheng et al. 2017: g + lambda g^2 (w - w_c), seen as -(w' - w) of SGD of rate 1. The gradient itself stays."""
    shapes = [(70, 3), (130,), (), (0, 2)]
    now, before, given_ = (tensors(seed=seed + n, shapes=shapes) for n in range(3))
    job = Job(lambda p: optim.SGD(p, lr=1.0), now)
    gradient, computed_on = vectors_of(job.table, given_), vectors_of(job.table, before)
    for shard in job.shards(parts):
        shard.fold_compensated(Given(gradient), computed_on, strength)
        shard.step(None, None)
    for found, w, w_c, g in zip(job.values(), now, before, given_, strict=True):
        torch.testing.assert_close(found, w - (g + strength * g * g * (w - w_c)), rtol=1e-12, atol=1e-12)
    assert torch.equal(gradient["float64"], vectors_of(job.table, given_)["float64"])
    assert torch.equal(computed_on["float64"], vectors_of(job.table, before)["float64"])


def test_after_a_compensated_gradient_a_plain_one_is_plain() -> None:
    job = Job(lambda p: optim.SGD(p, lr=1.0), [torch.zeros(3, dtype=torch.float64)])
    (shard,) = job.shards(1)
    one, two = (vectors_of(job.table, [torch.full((3,), value, dtype=torch.float64)]) for value in (1.0, 2.0))
    shard.fold_compensated(Given(two), one, 0.5)  # 2 + 0.5 x 4 x (0 - 1)
    shard.step(None, None)
    assert job.values()[0].tolist() == [0.0] * 3
    shard.fold([Given(two)], [1.0])
    shard.step(None, None)
    assert job.values()[0].tolist() == [-2.0] * 3


def test_a_rate_holds_for_one_step_and_multiplies_each_groups_own() -> None:
    def make(parameters: Any) -> optim.Optimizer:
        return optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 8.0}])

    job = Job(make, [torch.zeros(70), torch.zeros(70)])
    (shard,) = job.shards(1)
    gradient = vectors_of(job.table, [torch.ones(70), torch.ones(70)])
    found = []
    for settings_, rate in ((None, 1.0), (None, 0.5), (None, 0.25), (None, 1.0), ([{"lr": 4.0}, {"lr": 2.0}], 0.5)):
        before = [value[0].item() for value in job.values()]
        shard.fold([Given(gradient)], [1.0])
        shard.step(settings_, None, rate=rate)
        found.append([old - value[0].item() for old, value in zip(before, job.values(), strict=True)])
    assert found == [[1, 8], [0.5, 4], [0.25, 2], [1, 8], [2, 1]]
    shard.fold([Given(gradient)], [1.0])
    shard.step(None, None)
    assert [value[0].item() for value in job.values()] == [-4.75 - 4, -23 - 2]
