"""Sparse rows against their oracles: torch's own optimizers in one process on the whole batch, rows never used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import parse_pace
from paceline.errors import ConfigError
from tests.driver import run_job

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own Adagrad, alone
ROWS, BATCH, ROUNDS = 150, 8, 5
USED = 100  # rows from here on are never looked up
Optimizers = Callable[[nn.Module], list[optim.Optimizer]]


class Ratings(nn.Module):
    """Two tables, of rows that are and are not a divisor of a cache line, and a dense layer."""

    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        self.users = nn.Embedding(ROWS, 4, sparse=sparse)
        self.words = nn.EmbeddingBag(ROWS, 7, mode="sum", sparse=sparse)
        self.top = nn.Linear(11, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.users(ids[:, 0]), self.words(ids[:, 1:])], 1)
        return self.top(torch.tanh(both))[:, 0]


def make_model(*, sparse: bool = True) -> Ratings:
    torch.manual_seed(0)
    return Ratings(sparse=sparse).double()


# For bodies of workers, which are threads with one source of random numbers among them.
MODEL = make_model()


def make_data(samples: int) -> TensorDataset:
    """ids repeat within a sample's bag, within a batch, and across workers."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, USED, (samples, 4), generator=generator)
    ids[:, 0] %= 6
    ids[::2, 1] = ids[::2, 2]
    return TensorDataset(ids, torch.randn(samples, generator=generator, dtype=torch.float64))


def tables(model: nn.Module) -> list[nn.Parameter]:
    return [model.users.weight, model.words.weight]


class Mine(optim.Adagrad):
    """Not one of torch's own, so never cut within a parameter."""


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda m: [optim.SGD(m.parameters(), lr=0.1)],
    "momentum": lambda m: [optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True)],
    "adagrad": lambda m: [optim.Adagrad(m.parameters(), lr=0.05, initial_accumulator_value=0.1)],
    "sparse adam": lambda m: [optim.SparseAdam(tables(m), lr=0.01), optim.Adam(m.top.parameters(), lr=0.01)],
    "of one's own": lambda m: [Mine(m.parameters(), lr=0.05)],
    "groups": lambda m: [
        optim.SGD([{"params": tables(m), "lr": 0.5}, {"params": m.top.parameters(), "momentum": 0.9}], lr=0.1)
    ],
}
BY_ROWS = [name for name in OPTIMIZERS if name != "momentum"]


def train(
    run: Any, model: nn.Module, make: Optimizers, data: TensorDataset, *, batch: int = BATCH, clip: float = 0.0
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The parameters and the optimizers' states at the end."""
    made = make(model)
    loader: Any = DataLoader(data, batch_size=batch)
    if run is not None:
        model, *made, loader = run.wrap(model, *made, loader)
    for ids, y in loader:
        for optimizer in made:
            optimizer.zero_grad()
        (model(ids) - y).pow(2).mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in made:
            optimizer.step()
    values = [p.detach().clone() for p in model.parameters()]
    return values, [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in made]


def on_workers(name: str, workers: int, servers: int = 0, pace: str = "sync", **options: Any) -> list[Any]:
    data, model = make_data(ROUNDS * BATCH * workers), make_model()
    return run_job(
        lambda run: train(run, copy.deepcopy(model), OPTIMIZERS[name], data, **options),
        workers=workers,
        servers=servers,
        pace=parse_pace(pace),
        assign="round_robin",
    )


def assert_close(mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_bits(mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def assert_unused_rows_kept(values: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], fill: float) -> None:
    """To the bit: rows that nobody looked up are as they began, and so is their state."""
    assert_same_bits([v[USED:] for v in values[:2]], [p.detach()[USED:] for p in tables(make_model())])
    like = [t for state in states[0].values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim() == 2]
    for tensor in like:
        if len(tensor) == ROWS:
            assert torch.equal(tensor[USED:], torch.full_like(tensor[USED:], fill))
            assert not torch.equal(tensor[:USED], torch.full_like(tensor[:USED], fill))


@pytest.mark.sampled
@pytest.mark.parametrize("servers", [0, 1, 2])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_workers_equal_one_process_on_the_whole_batch(name: str, workers: int, servers: int) -> None:
    data = make_data(ROUNDS * BATCH * workers)
    alone, state_alone = train(None, make_model(), OPTIMIZERS[name], data, batch=BATCH * workers)
    results = on_workers(name, workers, servers)
    assert_close(results[0][0], alone, 1e-12 * ROUNDS)
    for values, _ in results[1:]:
        assert_same_bits(results[0][0], values)
    for mine, other in zip(results[0][1], state_alone, strict=True):
        for param, state in other.items():
            for key, value in state.items():
                dense = value.to_dense() if isinstance(value, torch.Tensor) and value.is_sparse else value
                torch.testing.assert_close(mine[param][key], dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BY_ROWS)
def test_the_number_of_shards_changes_no_bit(name: str) -> None:
    results = [on_workers(name, 4, servers)[0][0] for servers in (0, 1, 3)]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("pace", ["sync", "quorum:1", "bounded:1", "async"])
@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("name", ["adagrad", "sparse adam"])
def test_rows_that_nobody_looks_up_stay_to_the_bit_and_so_does_their_state(name: str, servers: int, pace: str) -> None:
    values, states = on_workers(name, 2, servers, pace)[0]
    assert_unused_rows_kept(values, states, 0.1 if name == "adagrad" else 0.0)


@pytest.mark.sampled
@pytest.mark.parametrize("pace", ["sync", "bounded:0", "quorum:1", "async"])
@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_is_plain_torch_at_every_pace(name: str, servers: int, pace: str) -> None:
    alone, _ = train(None, make_model(), OPTIMIZERS[name], make_data(ROUNDS * BATCH))
    assert_close(on_workers(name, 1, servers, pace)[0][0], alone, 1e-12 * ROUNDS)


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("pace", ["async", "bounded:2"])
def test_every_push_is_applied_once_to_every_row(pace: str, servers: int) -> None:
    """With whole gradients that depend on the data alone, and rate 1, any order ends at exactly their sum."""
    workers, batches = 3, 12
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ROWS, (workers * batches, 1, 5), generator=generator)

    def body(run: Any) -> torch.Tensor:
        model = nn.Embedding(ROWS, 4, sparse=True).double()
        nn.init.zeros_(model.weight)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        loader: Any = DataLoader(TensorDataset(ids), batch_size=1)
        model, optimizer, loader = run.wrap(model, optimizer, loader)
        for (batch,) in loader:
            optimizer.zero_grad()
            (model(batch[0]) * torch.arange(1.0, 5.0).double()).sum().backward()
            optimizer.step()
        return model.weight  # read when all are done: workers compute on the one table

    expected = -torch.bincount(ids.flatten(), minlength=ROWS)[:, None] * torch.arange(1.0, 5.0).double()
    for weight in run_job(body, workers=workers, servers=servers, pace=parse_pace(pace), assign="round_robin"):
        assert torch.equal(weight.detach(), expected)


def test_asynchronous_workers_compute_on_one_table_and_on_dense_copies() -> None:
    def body(run: Any) -> tuple[Any, ...]:
        model = copy.deepcopy(MODEL)
        model, _ = run.wrap(model, optim.SGD(model.parameters(), lr=0.1))
        if run.rank == 0:
            with torch.no_grad():
                model.users.weight[3] = 7.0
                model.top.weight[0] = 7.0
        return model.users.weight, model.top.weight

    (table, top), (its_table, its_top) = run_job(body, workers=2, pace=parse_pace("async"), assign="round_robin")
    assert torch.equal(table, its_table)
    assert not torch.equal(top, its_top)


@pytest.mark.parametrize("servers", [0, 2])
def test_a_mean_over_uneven_batches_is_weighted_by_samples(servers: int) -> None:
    data, model = make_data(BATCH + 3), make_model()

    def body(run: Any) -> Any:
        return train(run, copy.deepcopy(model), OPTIMIZERS["adagrad"], data)[0]

    alone, _ = train(None, make_model(), OPTIMIZERS["adagrad"], data, batch=BATCH + 3)  # one round: 8 and 3 samples
    assert_close(run_job(body, workers=2, servers=servers)[0], alone)


@pytest.mark.parametrize("servers", [0, 2])
def test_a_table_without_a_gradient_is_not_stepped(servers: int) -> None:
    """None on all workers: no step is counted for it. A gradient on one: the others bring no rows."""

    def steps(run: Any) -> Any:
        model = nn.ModuleDict({n: nn.Embedding(80, 3, sparse=True) for n in ("used", "sometimes", "never")}).double()
        optimizer = optim.SparseAdam(model.parameters(), lr=0.1)
        model, optimizer = run.wrap(model, optimizer)
        before = copy.deepcopy(model.state_dict())
        for number in range(4):
            optimizer.zero_grad()
            loss = model["used"](torch.tensor([number, number])).sum()
            if run.rank == 0 and number % 2:
                loss = loss + model["sometimes"](torch.tensor([number])).sum()
            loss.backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        moved = [(model[n].weight - before[f"{n}.weight"]).ne(0).any(1).nonzero()[:, 0].tolist() for n in model]
        return [state[param]["step"] if param in state else 0 for param in range(3)], moved

    for counted, moved in run_job(steps, workers=2, servers=servers):
        assert counted == [4, 2, 0]
        assert moved == [[0, 1, 2, 3], [1, 3], []]


@pytest.mark.parametrize("servers", [0, 2])
def test_a_table_that_is_also_used_densely_is_the_same_as_alone(servers: int) -> None:
    """Tied weights: the gradient comes dense, and travels as the rows that are not zero."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 5, sparse=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.words(ids[:, 0]) @ self.words.weight[:9].T

    torch.manual_seed(1)
    start = Tied().double()

    def body(run: Any, batch: int = BATCH) -> list[torch.Tensor]:
        model = copy.deepcopy(start)  # not made anew: threads have one source of random numbers
        optimizer = optim.Adagrad(model.parameters(), lr=0.1)
        loader: Any = DataLoader(TensorDataset(torch.arange(64).view(-1, 1) % 7), batch_size=batch)
        if run is not None:
            model, optimizer, loader = run.wrap(model, optimizer, loader)
        for (ids,) in loader:
            optimizer.zero_grad()
            model(ids).pow(2).mean().backward()
            assert not model.words.weight.grad.is_sparse
            optimizer.step()
        return [model.words.weight.detach().clone()]

    alone = body(None, batch=2 * BATCH)
    for values in run_job(body, workers=2, servers=servers):
        assert_close(values, alone)
        assert_same_bits([values[0][9:]], [alone[0][9:]])


@pytest.mark.parametrize("servers", [0, 2])
def test_clipping_by_the_global_norm_counts_the_rows(servers: int) -> None:
    """torch has no norm of sparse gradients, so the oracle's tables are dense; SGD steps both alike."""
    alone = train(None, make_model(sparse=False), OPTIMIZERS["sgd"], make_data(ROUNDS * 16), batch=16, clip=0.5)[0]
    clipped = on_workers("sgd", 2, servers, clip=0.5)
    assert_close(clipped[0][0], alone)
    with pytest.raises(AssertionError):
        assert_close(on_workers("sgd", 2, servers)[0][0], alone)


def test_half_precision_tables_fold_in_float32() -> None:
    """Three workers bring 1, 2^-8 and 2^-8 for one row: a sum in bfloat16 would lose both small ones."""
    small = 2.0**-8

    def body(run: Any) -> torch.Tensor:
        model = nn.Embedding(ROWS, 2, sparse=True).to(torch.bfloat16)
        nn.init.zeros_(model.weight)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        model, optimizer = run.wrap(model, optimizer)
        optimizer.zero_grad()
        (model(torch.tensor([5])) * (1.0 if run.rank == 0 else small) * 3).sum().backward()
        optimizer.step()
        return model.weight

    found = run_job(body, workers=3)[0].float()
    assert found[5, 0] == -(1 + 2 * small)
    assert found.ne(0).any(1).sum() == 1


def test_staleness_corrections_leave_rows_uncompensated() -> None:
    """One worker's parameters are the shared ones, so nothing is compensated and the run is plain."""
    data, model = make_data(ROUNDS * BATCH), make_model()

    def body(run: Any) -> Any:
        return train(run, copy.deepcopy(model), OPTIMIZERS["sgd"], data)[0]

    alone, _ = train(None, make_model(), OPTIMIZERS["sgd"], data)
    options: Any = {"pace": parse_pace("async"), "assign": "round_robin", "compensate": 0.04}
    assert_close(run_job(body, workers=1, **options)[0], alone)
    assert_unused_rows_kept(run_job(body, workers=2, staleness_damping=True, **options)[0], [{}], 0.0)


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_values_of_their_own_are_pulled_from_the_one_table(pace: str) -> None:
    """``share_parameters=False``, as on a GPU."""

    def body(run: Any) -> Any:
        model = copy.deepcopy(MODEL)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = run.wrap(model, optimizer, share_parameters=False)
        for ids, y in DataLoader(make_data(3 * BATCH), batch_size=BATCH):
            optimizer.zero_grad()
            (model(ids) - y).pow(2).mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    alone, _ = train(None, make_model(), OPTIMIZERS["sgd"], make_data(3 * BATCH))
    assert_close(run_job(body, workers=1, pace=parse_pace(pace), assign="round_robin")[0], alone)


def test_local_steps_are_the_users_own_also_of_sparse_adam() -> None:
    """What is averaged is the difference of whole parameters; one worker with outer rate 1 is plain torch."""
    alone, _ = train(None, make_model(), OPTIMIZERS["sparse adam"], make_data(ROUNDS * BATCH))
    assert_close(on_workers("sparse adam", 1, pace="local:2")[0][0], alone)


# --- what is refused ---


def refused(
    make: Callable[[nn.Module], optim.Optimizer], *, with_model: bool = True, pace: str = "sync"
) -> ConfigError:
    def body(run: Any) -> None:
        model = copy.deepcopy(MODEL)
        optimizer = make(model)
        run.wrap(*([model, optimizer] if with_model else [optimizer]))

    with pytest.raises(ConfigError) as caught:
        run_job(body, workers=2, pace=parse_pace(pace), assign="round_robin")
    return caught.value


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: optim.Adam(m.parameters()), "Adam does not step the sparse gradients"),
        (lambda m: optim.AdamW(m.parameters()), "AdamW does not step the sparse gradients"),
        (lambda m: optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1), "SGD does not step the sparse gradients"),
        (lambda m: optim.Adagrad(m.parameters(), weight_decay=0.1), "weight_decay option is not compatible"),
    ],
    ids=["Adam", "AdamW", "SGD with weight decay", "Adagrad with weight decay"],
)
def test_what_torch_does_not_step_by_rows_is_refused_when_wrapped(make: Any, says: str) -> None:
    error = refused(make)
    assert says in error.what
    assert "SparseAdam" in error.fix
    assert "sparse=False" in error.fix


def test_weight_decay_of_the_dense_layers_is_not_refused() -> None:
    def body(run: Any) -> None:
        model = copy.deepcopy(MODEL)
        groups = [{"params": tables(model)}, {"params": model.top.parameters(), "weight_decay": 0.1}]
        run.wrap(model, optim.SGD(groups, lr=0.1))

    run_job(body)


def test_sparse_adam_with_a_dense_parameter_is_refused_by_its_name() -> None:
    assert "SparseAdam has top.weight" in refused(lambda m: optim.SparseAdam(m.parameters())).what


def test_sparse_adam_without_its_model_is_refused_with_what_to_wrap() -> None:
    error = refused(lambda m: optim.SparseAdam(tables(m)), with_model=False)
    assert "give the model to run.wrap" in error.fix


def test_sparse_adam_is_refused_where_gradients_are_summed() -> None:
    error = refused(lambda m: optim.SparseAdam(tables(m)), pace="async:4")
    assert "pace async:4 pushes sums of gradients" in error.what
    assert "Adagrad" in error.fix


@pytest.mark.parametrize("pace", ["sync", "async", "async:2", "local:2"])
@pytest.mark.parametrize("embedding", [True, False])
def test_a_row_that_the_table_does_not_have_is_refused_by_the_worker_that_brings_it(pace: str, embedding: bool) -> None:
    def body(run: Any) -> None:
        table = nn.Embedding(5, 2, sparse=True) if embedding else nn.Linear(2, 5, bias=False)
        optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
        table, optimizer = run.wrap(table, optimizer)
        row = 5 if run.rank else 4
        table.weight.grad = torch.sparse_coo_tensor([[0, row]], torch.ones(2, 2), (5, 2), check_invariants=False)
        optimizer.step()

    with pytest.raises(ConfigError, match=r"the gradient of weight has row 5; there are rows 0 to 4"):
        run_job(body, pace=parse_pace(pace))


def test_a_gradient_of_another_shape_is_refused() -> None:
    def body(run: Any) -> None:
        model = nn.Linear(3, 2, bias=False)
        model, optimizer = run.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
        model.weight.grad = torch.zeros(2, 3)
        model.weight.grad.data = torch.ones(1, 3)  # which torch would spread over all rows
        optimizer.step()

    with pytest.raises(ConfigError, match=r"the gradient of weight has shape \[1, 3\]; it must be \[2, 3\]"):
        run_job(body, workers=1)
