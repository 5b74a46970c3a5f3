"""One wrapped optimizer of a worker elsewhere: where its parameters lie, and what of its gradients home has to get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch import nn, optim

from paceline.config import Job, Local, Sync
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.early import Bucket, Early, buckets
from paceline.engine.elsewhere.host_fold import HostFold
from paceline.engine.elsewhere.mail import Mail
from paceline.engine.elsewhere.mirror import HostMirror, Mirror
from paceline.engine.elsewhere.owners import Owners
from paceline.engine.elsewhere.range_links import Spread
from paceline.engine.elsewhere.table_parts import lay_rows, rows_of
from paceline.engine.exchange.exchange import make_inner
from paceline.engine.exchange.inner import Inner
from paceline.engine.exchange.replica import Apart, Replica
from paceline.engine.exchange.spec import describe
from paceline.errors import ConfigError, HostError
from paceline.params import optimizers
from paceline.params.rows import Rows, check_numbers, count_values
from paceline.protocol import mirrors, remote
from paceline.transport import segment
from paceline.transport.borrow import borrow
from paceline.transport.slots import ExchangeMemory, Spec, size_bytes


class RemoteExchange:
    """In memory of this process, of home, or in a mirror of that: laid out alike. Raises ConfigError for an optimizer
    that cannot be shared, or not from elsewhere."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        names: dict[int, str],
        with_rows: set[int],
        job: Job,
        index: int,
        *,
        share: bool,
        travels: bool,
    ) -> None:
        check_elsewhere(optimizer)
        self.optimizer, self.index, self._pace = optimizer, index, job.pace
        self._travels = travels  # does what it brings go to another host?
        # At other paces the deputy clips the push, if it has it.
        self._clip = job.clip if isinstance(job.pace, Sync) or job.server_hosts > 1 else None
        self._views = share and not isinstance(job.pace, Local)
        self.parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self.spec, stepped_by = describe(optimizer, names, with_rows, job, job.pace)
        self.steps_by_itself = stepped_by is not optimizer
        self.inner: Inner | None = None
        self.early: Early | None = None
        self.mirror: Mirror | None = None
        self.is_adopted = False
        self.is_home = False  # do the parameters lie in home's memory?
        self.host: HostMirror | None = None  # or in a mirror that the workers of this host share
        self.is_in_crew = False  # is what it brings folded in shares? With what its host's other workers bring:
        self.owners: Owners | None = None  # of this worker, if it is the first of its host
        self.fold: HostFold | None = None  # and if there are others
        self._make_fold: Callable[[ExchangeMemory, Apart | None], HostFold] | None = None
        self._apart: Apart | None = None  # at home, then: its own gradients, whose place in the slot folds take
        self.spread: Spread | None = None  # where servers on several hosts have a part
        self.is_finite = True  # what was gathered last
        self.is_measured = False  # was a norm asked of it, for the step that is to come?
        # Since a norm was asked of what is in the slot: by what the script's gradients have been multiplied.
        self._factor: torch.Tensor | None = None
        self._memory: ExchangeMemory | None = None
        self._ready: set[int] = set()  # buckets in the slot
        self._settings = optimizers.Settings(optimizer)
        sizes = self.spec.table.dense_sizes
        self.whole: Sequence[Bucket] = [Bucket(vector, 0, size, ()) for vector, size in sizes.items()]
        self.buckets: Sequence[Bucket] = self.whole

    def lay_out(self, mail: Mail, kind: str, rank: int) -> None:
        """Make memory, but where it is others', and tell where what comes belongs."""
        self.is_home = kind == remote.HOME
        if kind == remote.MIRROR:
            self._look_into(Mirror(self.spec, self.index, rank), mail, rank)
        elif kind == remote.OWN:
            self.mirror = self.host = None
            own = msgspec.structs.replace(self.spec, workers=1, servers=0, parts=0, state=())
            memory = ExchangeMemory(segment.own(size_bytes(own)), own)
            for vector in self.spec.table.dense_sizes:
                mail.expect(f"parameters/{self.index}/{vector}", memory.params[vector])
            self._use(memory, own, 0)
            if self.spread is not None:
                self.spread.expect(memory)

    def own(
        self,
        mail: Mail,
        rank: int,
        owners: Owners,
        mirror: Mirror | None,
        make_fold: Callable[[ExchangeMemory, Apart | None], HostFold] | None,
    ) -> None:
        """Have a share of what all bring: in this mirror, or where home's memory is to be taken into use.
        ``make_fold``: of what this host's workers bring in that memory, where there are several; this one's may be
        apart."""
        self.owners, self._make_fold = owners, make_fold
        if mirror is None:
            self._apart = Apart.of(self.spec.table)
            return
        self.host = mirror if isinstance(mirror, HostMirror) else None
        self._look_into(mirror, mail, rank)

    @property
    def owns(self) -> Owners | None:
        """Is the gradient that comes to be folded by owners? By these."""
        return self.owners if self.owners is not None and self.owners.is_on else None

    @property
    def is_shared_out(self) -> bool:
        """Is the gradient that comes to be folded in shares, by this worker or the first of its host?"""
        return self.is_in_crew and (self.owners is None or self.owners.is_on)

    def disown(self) -> None:
        """This worker has no share any more."""
        self.is_in_crew = False
        if self.fold is not None:
            self.fold.stop()
            self.fold = None
        if self.owners is not None:
            self.owners.stop()
            self.owners = None

    def attach(self, place: tuple[int, int], rank: int) -> None:
        """Take home's memory into use: that of a descriptor of a process of this host."""
        self._use(ExchangeMemory(borrow(*place), self.spec), self.spec, rank)

    def attach_mirror(self, mail: Mail, memory: ExchangeMemory, rank: int, around: Around) -> None:
        """Take the mirror of this host's workers into use, of which this one is ``rank``."""
        members = around.members(rank)
        others = next(other for other in range(len(around.hosts)) if other not in members)
        self.host = HostMirror(self.spec, self.index, rank, memory, members, others)
        self._look_into(self.host, mail, rank)

    def _look_into(self, mirror: Mirror, mail: Mail, rank: int) -> None:
        self.mirror = mirror
        mirror.expect(mail)
        self._use(mirror.memory, self.spec, rank)

    @property
    def lies_with_others(self) -> bool:
        """Are gradients written where other processes look for them?"""
        return self.is_home or self.host is not None

    @property
    def memory(self) -> ExchangeMemory:
        """Where it lies."""
        assert self._memory is not None
        return self._memory

    def _use(self, memory: ExchangeMemory, spec: Spec, rank: int) -> None:
        self._memory, self._factor = memory, None
        self.replica = Replica(
            self.optimizer, spec, memory, rank, views=self._views, apart=self._apart, travels=self._travels
        )
        self.inner = make_inner(self.replica, self._pace)
        if self.owners is not None:
            self.fold = None if self._make_fold is None else self._make_fold(memory, self._apart)
            if self.fold is None:
                self.owners.use(self.replica.gradient, self._own_rows)
            else:
                self.owners.use(self.fold.vectors, self.fold.rows)
        if self.early is not None:
            self.early.use(self.replica)

    def send_early(self, tell: Callable[[RemoteExchange, int], None]) -> None:
        """From now on ``tell`` hears of each bucket of gradients when backward has made it."""
        self.buckets = buckets(self.spec.table)
        self.early = Early(self.replica, self.buckets, lambda place: tell(self, place))

    def tell_ready(self, rank: int, place: int) -> None:
        """Where others look: buckets up to this one are in the slot."""
        assert self._memory is not None
        self._ready.add(place)
        count = next(n for n in range(len(self.buckets) + 1) if n not in self._ready)
        self._memory.tell_ready(rank, max(self._memory.stepped) + 1, count)

    def tell_all_ready(self, rank: int) -> None:
        """Where others look: all of the gradient is in the slot, rows too."""
        if self.early is not None:
            assert self._memory is not None
            self._memory.tell_ready(rank, max(self._memory.stepped) + 1, len(self.buckets) + 1)

    def mistaken(self, told: remote.Follow) -> str | None:
        """Why this cannot be a round of the mirror."""
        if self.mirror is None:
            return "it has no mirror"
        return mirrors.mistaken(told, self.spec.workers, len(self.parameters), self.spec.settings_bytes)

    def follow(self, told: remote.Follow) -> None:
        """The round is over: let the mirror step it."""
        assert self.mirror is not None
        self.mirror.follow(told, self.optimizer)
        self.replica.pull()

    def adopt(self, show_state: Callable[[], None]) -> None:
        """The newest values have come: from now on the parameters lie where these come."""
        self.replica.adopt()
        self.is_adopted = True
        if not self.steps_by_itself and self.inner is None:
            self.optimizer.state.clear()
            self.optimizer.register_state_dict_pre_hook(lambda _: show_state())

    def pull(self) -> None:
        """The newest values are where they come; home's memory, on the way to its first use, has no others."""
        if self._memory is not None:
            self.replica.pull()

    def take_newest(self, mail: Mail, tables: Sequence[int]) -> None:
        """They have come; of these tables the rows that have changed."""
        if self._memory is None:
            return  # they lie in home's, which is taken into use with this answer
        with torch.no_grad():
            for place in tables:
                if place not in self.replica.slot.rows:
                    raise ConfigError(f"rows of parameter {place} have come, which is no table")
                entry = self.spec.table.entries[place]
                numbers = mail.take(f"numbers/{self.index}/{place}", torch.int64)
                shared = self.replica.shared[place]
                values = mail.take(f"rows/{self.index}/{place}", shared.dtype, (len(numbers), entry.row))
                check_numbers(numbers, len(shared), f"what has come of {entry.name}")
                shared[numbers] = values
        self.replica.pull()

    def take_from_servers(self, told: remote.Await) -> None:
        """Wait for what servers elsewhere have. Raises LinkEnded."""
        if self.spread is None:
            raise HostError(f"home has this worker wait for servers, of which none has a part of exchange {self.index}")
        self.spread.take_newest(told, lambda param: self.replica.shared[param])

    def gather(self) -> Sequence[Bucket]:
        """Write the gradients into the slot; what of it home has not got yet, without rows."""
        if self.early is not None:
            rest = self.early.gather()
            self.is_finite = self.early.was_finite
            return rest
        self.is_finite = self.replica.write_gradients()
        return self.whole

    def clip(self) -> None:
        """As the job's options say."""
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._clip)

    def lay_own(self) -> None:
        """At home: have the slot hold this worker's gradient, and no fold."""
        if self._apart is not None:
            slot, table = self.replica.slot, self.spec.table
            for vector in table.dense_sizes:
                slot.gradient[vector].copy_(self._apart.gradient[vector])
            for param in self._apart.rows:
                lay_rows(self._own_rows(param), slot, param, table.entries[param])

    def measured(self) -> None:
        """A norm is asked of what was gathered."""
        self.is_measured = True
        multiplies = self.early is not None and self.is_finite and self.spread is None
        self._factor = torch.ones(()) if multiplies else None

    def clipped(self, factor: torch.Tensor) -> None:
        """The script's gradients have been multiplied by this."""
        if self._factor is not None:
            self._factor = factor

    def factor(self) -> float | None:
        """By what the gradient in the slot is to be multiplied to be the script's; None if that may be any other."""
        factor = self._factor
        is_usable = factor is not None and bool(torch.isfinite(factor)) and float(factor) > 0
        return float(factor) if factor is not None and is_usable and self.replica.has_written(factor) else None

    def gradients(self, some: Sequence[Bucket]) -> Iterable[tuple[str, torch.Tensor, int, int]]:
        """What is in the slot: these ranges of dense vectors, and rows with their numbers; as (name, alias, range)."""
        slot = self.replica.slot
        for one in some:
            yield f"gradient/{self.index}/{one.vector}", slot.gradient[one.vector], one.start, one.stop
        for place, signed in self.rows().items():
            entry, numbers = self.spec.table.entries[place], slot.rows[place][1 : abs(signed) + 1]
            values = self.spec.table.view(entry, slot.gradient[entry.vector]).view(-1)
            size = count_values(numbers) * entry.row
            yield f"numbers/{self.index}/{place}", numbers, 0, len(numbers)
            yield f"values/{self.index}/{place}", values[:size], 0, size

    def rows(self) -> dict[int, int]:
        """How many rows each table's gradient has, of those that have one; negative where they are not unique."""
        slot = self.replica.slot
        return {place: int(area[0]) for place, area in slot.rows.items() if slot.mask[place]}

    def _own_rows(self, param: int) -> Rows:
        return rows_of(self.replica.brought, param, self.spec.table.entries[param])

    def stepped(self) -> None:
        """What backward makes now is for the next step."""
        self._ready.clear()
        self._factor, self.is_measured = None, False
        if self.early is not None:
            self.early.stepped()

    def write_local(self) -> None:
        """Into the slot, what local steps have come to: the parameters, or the sum that is there."""
        assert self.inner is not None
        if not isinstance(self._pace, Local):
            self.inner.brought()
            return
        entries, vectors = self.spec.table.entries, self.replica.slot.gradient
        with torch.no_grad():
            for entry, parameter in zip(entries, self.parameters, strict=True):
                self.spec.table.view(entry, vectors[entry.vector]).copy_(parameter)

    def first_bad(self) -> int | None:
        """The first parameter whose gradient is not finite."""
        if self.replica.has_finite_gradients():
            return None
        gradients = [p.grad for p in self.parameters]
        return next(i for i, g in enumerate(gradients) if g is not None and not torch.isfinite(g.to_dense()).all())

    def changed_settings(self) -> bytes:
        """The hyper-parameters of the optimizer that steps at home, if they have changed."""
        changed = None if self.steps_by_itself else self._settings.changed()
        return b"" if changed is None else optimizers.encode(changed)

    # --- what is this worker's own, for a Keeper ---

    @property
    def settings(self) -> list[optimizers.Group]:
        """As ``Exchange.settings``."""
        return optimizers.settings(self.optimizer)

    def load_settings(self, groups: Sequence[optimizers.Group]) -> None:
        optimizers.load_settings(self.optimizer, groups)

    def own_state(self) -> dict[int, dict[str, Any]]:
        """As ``Exchange.own_state``."""
        state = {} if self.inner is None else self.optimizer.state
        return {index: dict(state[p]) for index, p in enumerate(self.parameters) if p in state}

    def load_own_state(self, state: dict[int, dict[str, Any]]) -> None:
        for index, values in state.items() if self.inner is not None else ():
            self.optimizer.state[self.parameters[index]] = values


def check_elsewhere(optimizer: optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer that cannot be shared, or not be made anew at home."""
    optimizers.check(optimizer)
    kind = type(optimizer)
    own = optimizers.own_attributes(optimizer)
    if own:
        raise ConfigError(
            f"{kind.__name__} keeps {own[0]!r} in the object; home, which steps, gets the class and param_groups only",
            fix="keep it in param_groups (the constructor's defaults)",
        )
    if kind.__module__ == "__main__":
        raise ConfigError(
            f"optimizer {kind.__qualname__} is defined in the script, which home does not import",
            fix="put the class in a module beside the script",
        )
