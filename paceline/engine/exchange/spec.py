"""What an exchange is, before its memory is there: the spec that all workers must agree on.

From the user's optimizer and the pace follow what is pushed, whose optimizer steps the shared parameters, which of them
are stepped by rows, what state is kept, and how many parts the parameters are cut into.
"""

from __future__ import annotations

import msgspec
import torch
from torch import optim

from paceline.config import Async, Bounded, Job, Local, Pace, Quorum, Sync
from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.table import differences, tabulate
from paceline.transport.slots import Spec

_PARTS_PER_SERVER = 2
_VALUES_PER_PART = 1 << 16  # smaller parts are not worth their turns


def describe(
    optimizer: optim.Optimizer, names: dict[int, str], with_rows: set[int], job: Job, pace: Pace
) -> tuple[Spec, optim.Optimizer]:
    """The exchange of this optimizer, and what steps the shared parameters. Raises ConfigError."""
    if not any(group["params"] for group in optimizer.param_groups):
        raise ConfigError("the optimizer has no parameters")
    with_gradients = sends_gradients(pace)
    stepped_by = _outer(optimizer, pace) if isinstance(pace, Local) else optimizer
    kind, groups = type(stepped_by), stepped_by.param_groups
    numbered = [(g, p) for g, group in enumerate(groups) for p in group["params"]]
    if isinstance(stepped_by, optim.SparseAdam) and not with_gradients:
        raise ConfigError(
            f"pace {pace} pushes sums of gradients, which are dense; SparseAdam steps sparse ones only",
            fix="--pace async, sync or local:H; or SGD or Adagrad for the embeddings",
        )
    settings = optimizers.settings(stepped_by)
    by_rows = {
        id(p)
        for g, p in numbered
        if id(p) in with_rows and with_gradients and optimizers.takes_rows(stepped_by, p, settings[g])
    }
    named = ((names.get(id(p), f"parameter {i}"), g, p) for i, (g, p) in enumerate(numbered))
    table = tabulate(named, by_rows)
    optimizers.check_rows(stepped_by, table)
    for group, plain in zip(groups, settings, strict=True):
        if any(id(p) in by_rows for p in group["params"]):
            continue  # the fused kernels take dense gradients only
        dtypes = [p.dtype for p in group["params"]]
        if optimizers.choose_fused(kind, plain, dtypes, torch.device("cpu")):
            plain["fused"] = True
    encoded = optimizers.encode(settings)
    elementwise = optimizers.is_elementwise(kind)
    items = optimizers.describe_state(
        table,
        optimizers.decode(encoded),
        lambda asked: optimizers.clone(vars(stepped_by), kind, asked),
        [stepped_by.state.get(p) or {} for _, p in numbered],
        elementwise=elementwise,
    )
    spec = Spec(
        table=table,
        optimizer=optimizers.class_path(kind),
        whole=not elementwise,
        settings=encoded,
        settings_bytes=4 * len(encoded) + 4096,
        state=items,
        workers=job.places,
        servers=job.server_places,
        shares=job.server_places or job.workers,
        hosts=job.server_hosts if pace is job.pace else 1,
        stamps=job.engine != "local" and (job.server_places > 0 or not isinstance(pace, Sync)),
        parts=_parts(job, sum(e.size for e in table.entries if not e.row))
        if isinstance(pace, Quorum | Bounded | Async)
        else 0,
        damping=job.staleness_damping and pace is job.pace,
        compensate=(job.compensate or 0.0) if pace is job.pace else 0.0,
    )
    return spec, stepped_by


def sends_gradients(pace: Pace) -> bool:
    """Is what is pushed one step's gradient, not what several local steps have come to?"""
    return not isinstance(pace, Local) and not (isinstance(pace, Async) and pace.every > 1)


def _parts(job: Job, values: int) -> int:
    if job.servers:
        return max(job.servers * _PARTS_PER_SERVER, job.server_places)
    return max(1, min(job.workers, values // _VALUES_PER_PART))


def _outer(optimizer: optim.Optimizer, pace: Local) -> optim.Optimizer:
    """The optimizer that steps the shared parameters with (shared - own) as gradient, over the same parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ConfigError(f"pace {pace} averages parameters; one of them has dtype {parameter.dtype}")
    momentum = pace.outer_momentum
    return optim.SGD(parameters, lr=pace.outer_lr, momentum=momentum, nesterov=momentum > 0)


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
