"""The parameter servers of others, in our words: one on torch.distributed.rpc, one as Ray's documentation has it.

Both are synchronous: the server waits for both workers' gradients, steps their mean, and gives back the parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor, nn, optim

from benchmarks.jobs import JOBS

_SERVER = "server"


class _Served:
    """What the rpc server's process holds: the model, and the gradients that have come for its next step."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, workers: int) -> None:
        self.parameters = list(model.parameters())
        self.optimizer, self.workers = optimizer, workers
        self.lock = threading.Lock()
        self.arrived: list[list[Tensor]] = []
        self.answer: torch.futures.Future[list[Tensor]] = torch.futures.Future()


_served: _Served | None = None


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _bring(gradients: list[Tensor]) -> torch.futures.Future[list[Tensor]]:
    """Runs in the server; the answer comes when all workers have brought theirs."""
    assert _served is not None
    with _served.lock:
        _served.arrived.append(gradients)
        answer = _served.answer
        if len(_served.arrived) == _served.workers:
            _step(_served.parameters, _served.optimizer, _served.arrived)
            _served.arrived, _served.answer = [], torch.futures.Future()
            answer.set_result([parameter.detach() for parameter in _served.parameters])
    return answer


def _step(parameters: Sequence[nn.Parameter], optimizer: optim.Optimizer, given: Sequence[Sequence[Tensor]]) -> None:
    for parameter, *gradients in zip(parameters, *given, strict=True):
        parameter.grad = sum(gradients[1:], gradients[0]) / len(gradients)
    optimizer.step()


def connect(rank: int, workers: int, path: str) -> None:
    name = _SERVER if rank == workers else f"worker{rank}"
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{path}.rpc", rpc_timeout=600)
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


def serve(model: nn.Module, optimizer: optim.Optimizer, rank: int, workers: int, path: str) -> None:
    """The server's process: ends when the workers have."""
    global _served
    _served = _Served(model, optimizer, workers)
    connect(rank, workers, path)
    rpc.shutdown()


def end() -> None:
    """A worker's end: waits for the others'."""
    rpc.shutdown()


class ThroughServer:
    """Stands for a worker's optimizer: a step is a call to the server."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        fresh = rpc.rpc_sync(_SERVER, _bring, args=([parameter.grad for parameter in self._parameters],))
        with torch.no_grad():
            for parameter, value in zip(self._parameters, fresh, strict=True):
                parameter.copy_(value)


class _RayServer:
    """An actor: holds the model, steps the mean of what it is given, and hands out weights."""

    def __init__(self, job: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._model = JOBS[job].model()
        self._optimizer = JOBS[job].optimizer(self._model, False)

    def weights(self) -> list[Any]:
        return [parameter.detach().numpy() for parameter in self._model.parameters()]

    def apply(self, *given: list[Any]) -> list[Any]:
        _step(list(self._model.parameters()), self._optimizer, [[torch.from_numpy(g) for g in one] for one in given])
        return self.weights()


class _RayWorker:
    """An actor: computes the gradients of its next batch at given weights."""

    def __init__(self, job: str, rank: int) -> None:
        torch.set_num_threads(1)
        self._job, self._model = JOBS[job], JOBS[job].model()
        self._batches, self._next = self._job.batches(seed=rank), 0

    def gradients(self, weights: list[Any]) -> list[Any]:
        with torch.no_grad():
            for parameter, value in zip(self._model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(value))
        inputs, target = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        self._model.zero_grad()
        self._job.loss(self._model(*inputs), target).backward()
        return [parameter.grad.numpy() for parameter in self._model.parameters() if parameter.grad is not None]


def ray_step(job: str, workers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(take one step of all workers, wait until the last one is done); the driver's part."""
    import ray

    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    server = ray.remote(_RayServer).remote(job)
    team = [ray.remote(_RayWorker).remote(job, rank) for rank in range(workers)]
    weights = server.weights.remote()

    def step() -> None:
        nonlocal weights
        weights = server.apply.remote(*[worker.gradients.remote(weights) for worker in team])
        if len(steps) >= 4:  # not to queue a whole slice's objects
            ray.wait([steps.pop(0)], fetch_local=False)
        steps.append(weights)

    def finish() -> None:
        ray.wait([weights], fetch_local=False)

    steps: list[Any] = []
    return step, finish
