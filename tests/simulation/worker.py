"""A worker's and a server's process: paceline's own code from ``Worker`` and ``Exchange`` down, without tensors.

Replaced are only the ends of it: a gradient is the batches it was computed on, a share's step is recorded, and the
script is played from a plan. ``in_place`` puts these in
their places for as long as a schedule runs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec

from paceline.config import Job, Local
from paceline.data import ledger
from paceline.data.loader import _streamed
from paceline.data.part import Part
from paceline.data.passes import Leases, Reading, one_pass
from paceline.engine.checkpoint import saving
from paceline.engine.context import Context
from paceline.engine.exchange import exchange as exchange_module
from paceline.engine.exchange import server
from paceline.engine.exchange.applier import Applier
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.shards import Shards
from paceline.engine.exchange.stepper import Stepper
from paceline.engine.worker import catching_up, handover
from paceline.engine.worker import worker as worker_module
from paceline.engine.worker.ending import Leave
from paceline.engine.worker.position import trained_before
from paceline.engine.worker.worker import Worker
from paceline.params.undo import Undo
from paceline.protocol import messages
from paceline.protocol.deals import Deal
from paceline.protocol.log import Entry
from paceline.protocol.rounds import NOT_PARKED
from paceline.transport import board as board_module
from paceline.transport.board import COLLECTIVES
from tests.simulation.claims import Batch, Claims
from tests.simulation.memory import (
    LOADERS,
    Futexes,
    Host,
    SimulatedBoard,
    SimulatedLeases,
    SimulatedLock,
    SimulatedMemory,
)
from tests.simulation.plans import Plan, Script

TRAIN, EVALUATE = 0, 1  # the loaders
CHUNKS = 2  # of a share's step; between them its stepper may be killed


class Life:
    """One process that is worker ``rank``: the first, or one that takes the place of those that have died. ``tell``
    sends the launcher a message, ``receive`` waits for its answer."""

    def __init__(self, host: Host, plan: Plan, claims: Claims, rank: int, tell: Callable[[messages.Any], None]) -> None:
        self._host, self._plan, self._claims, self._rank, self._tell = host, plan, claims, rank, tell
        self.given: set[int] = set()  # the collectives' memory that the launcher has sent
        self.kept: list[messages.Kept] = []

    def run(self) -> None:
        host, plan, rank = self._host, self._plan, self._rank
        board = SimulatedBoard(host)
        lock: Any = SimulatedLock(host.scheduler, board.journal)
        channel: Any = SimpleNamespace(send=self._send, receive=self._receive)
        job = job_of(plan)
        resume = None if host.resumed is None else Path()
        trained = () if host.resumed is None else trained_before(host.resumed, job)
        context = Context(job, "worker", rank, Path(), channel, board, lock, resume, trained)
        worker = Worker(context)
        model: Any = SimpleNamespace(training=True)
        worker.knows([model])
        exchange = SimulatedExchange(context, host)
        self._open(worker, exchange, board)
        worker.passes.count = LOADERS
        if plan.leased:
            for loader in range(LOADERS):
                self._ask(worker, board)
                tell = partial(worker.passes.tell_returned, loader)
                worker._leases[loader] = SimulatedLeases(host, loader, board.journal, lock, rank, tell)
                resumed = worker._checkpoint() if worker._leases[loader].is_new else None
                if resumed is not None:  # as ``Worker._share_leases``
                    worker._leases[loader].refill(*resumed.state["loaders"][loader]["ledger"])
        loaders = [Loader(index, worker, plan, rank, self._claims) for index in range(LOADERS)]
        try:
            Played(self._plan, self._claims, rank, worker, exchange, loaders, model).play(plan.script(rank))
        except Leave:
            self._claims.leave(rank)
            self._claims.met["left when asked to"] += 1
        worker.finish()

    def _open(self, worker: Worker, exchange: SimulatedExchange, board: SimulatedBoard) -> None:
        """As ``Worker.add_exchange`` and ``Collectives.open``."""
        collectives = worker.collectives
        self._ask(worker, board)
        self._claims.starts(self._rank)

        def close(entry: Entry) -> None:
            self._claims.closes(entry)
            worker._close(exchange, entry, worker._ending.account)

        exchange.attach(exchange.memory, 1, close)
        worker._exchanges.append(exchange)
        if not collectives._is_filled():
            resumed = worker._checkpoint()
            if resumed is not None:
                exchange.go_on_from(resumed.state["exchanges"][0])
            collectives._publish()
        exchange.adopt()
        worker.progress.weights.add_exchange()

    def _ask(self, worker: Worker, board: SimulatedBoard) -> None:
        """As ``Collectives.ask``."""
        collectives, rank = worker.collectives, self._rank
        collectives.number += 1
        passes = board.passes(COLLECTIVES)
        passes[rank] = max(passes[rank], collectives.number)
        self._send(messages.Wrap(collectives.number, "simulated", b"", 1, ""))
        if collectives.takes_part:
            board.parked[rank] = COLLECTIVES + 1
            worker.context.ring()
        while collectives.number not in self.given:
            self._host.scheduler.sleep(f"worker {rank}'s channel")
        if collectives.takes_part:
            board.parked[rank] = NOT_PARKED

    def _receive(self) -> tuple[messages.Kept, tuple[int, ...]]:
        while not self.kept:
            self._host.scheduler.sleep(f"worker {self._rank}'s channel")
        return self.kept.pop(0), (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC),)

    def _send(self, message: messages.Any, descriptors: Sequence[int] = ()) -> None:
        if isinstance(message, messages.Part):
            self._claims.saves(message.number)
        # What is sent when some time has passed says nothing here: a schedule must not depend on a clock.
        if not isinstance(message, messages.Steps):
            self._host.scheduler.turn()
            self._tell(message)


class Played:
    """A training script."""

    def __init__(
        self,
        plan: Plan,
        claims: Claims,
        rank: int,
        worker: Worker,
        exchange: SimulatedExchange,
        loaders: Sequence[Loader],
        model: Any,
    ) -> None:
        self._plan, self._claims, self._rank = plan, claims, rank
        self._worker, self._exchange, self._loaders, self._model = worker, exchange, loaders, model
        self._parameter = exchange.parameter
        self._steps = 0

    def play(self, script: Script) -> None:
        for number in range(len(self._plan.batches)):
            if self._plan.loads[number]:
                self._load()
            left = self._train(script, number)
            if left and script.steps_after_break[number]:
                self._step()
            if script.ends_in == number:
                break
            if self._plan.evaluates[number]:
                self._evaluate()
        self._claims.leave(self._rank)

    def _train(self, script: Script, number: int) -> bool:
        """One pass; was it left early?"""
        seen, last, loader = 0, True, self._loaders[TRAIN]
        batches = iter(loader)
        try:
            for batch in batches:
                seen += 1
                if self._plan.asks_length:
                    last = loader.length() <= seen
                # Nothing is trained on by who catches up, nor behind the end of training: by one that was added when
                # all others had left.
                if not (self._worker._catching_up.is_muted or self._worker.over):
                    self._claims.read(self._rank, batch)
                    self._claims.compute(self._rank)
                self._parameter.backward(batch)
                if seen % script.accumulate[number] == 0:
                    self._step()
                    every = self._plan.evaluates_every
                    if every and self._steps % every == 0:
                        self._evaluate()
                else:
                    self._claims.keeps(self._rank)
                if seen == script.breaks_after[number]:
                    return True
        finally:
            batches.close()
        assert last or self._worker.over, f"worker {self._rank} was told that a batch is not the last of its pass"
        return False

    def _load(self) -> None:
        """A checkpoint of the script's own."""
        self._worker.loaded([self._parameter])
        self._claims.has_loaded(self._rank, self._exchange._loads)
        self._worker.loaded_state(0)
        self._claims.has_loaded(self._rank, self._exchange._loads)

    def _step(self) -> None:
        for _ in range(self._plan.clips):
            self._claims.norm(self._rank, self._worker.norm(self._exchange, b"\1", 1.0))
        before = dict(self._exchange.memory.slots[self._rank].copy)
        self._worker.exchange(0)
        if self._worker.progress.batch_dropped and not self._worker._catching_up.is_muted:
            after = self._exchange.memory.slots[self._rank].copy
            assert after != before, f"a push of worker {self._rank} is dropped though it is not late"
        self._claims.step(self._rank)
        self._parameter.clear()
        self._steps += 1

    def _evaluate(self) -> None:
        if self._rank >= self._plan.evaluators:
            return
        self._model.training = not self._plan.says_eval
        batches = iter(self._loaders[EVALUATE])
        for _ in batches:
            continue
        self._model.training = True


class Loader:
    """A wrapped loader, as ``data/loader.py`` makes one of a DataLoader with processes that draw ahead."""

    def __init__(self, index: int, worker: Worker, plan: Plan, rank: int, claims: Claims) -> None:
        self._index, self._worker, self._plan, self._rank = index, worker, plan, rank
        self._claims, self._ahead = claims, plan.script(rank).ahead
        self._reading, self._dealt = Reading(), 0

    def __len__(self) -> int:
        return 1

    def length(self) -> int:
        """Of the pass in progress, as the loader's ``len`` tells it."""
        return self._reading.length(lambda: 0, lambda: self._dealt)

    def __iter__(self) -> Any:
        return one_pass(self, self._index, self._worker.passes, self.batches, self._reading)

    def batches(self, leases: Leases | None, skip: int = 0, /) -> Iterator[tuple[Batch, int]]:
        number = self._worker.passes.epoch(self._index)
        self._worker.passes.fetching()
        plan, train = self._plan, self._index == TRAIN
        # A script that passes oftener than planned, as a newcomer's may, finds the last pass again.
        planned = min(number, len(plan.batches) - 1)
        total = plan.batches[planned] if train else plan.to_evaluate
        named = [(number if train else -1, ordinal) for ordinal in range(total)]
        if leases is None:
            deal = self._worker.passes.deal(self._index)
            assert deal is not None
            owned = dict(zip(named, plan.owners[planned] if train else range(total), strict=True))
            before = [trained.done for trained in self._worker._part.of(deal).trained_in(self._index, number)]
            mine = _part(owned, deal, before)
            if train and deal.rank >= 0 and not self._worker.passes.over and not self._worker._catching_up.is_muted:
                self._claims.deals(self._rank, number, deal)
            self._dealt = len(mine)
            yield from ((batch, 1) for batch in mine[skip:])
        elif plan.streamed:
            yield from _streamed(named, Part(0, 1, "round_robin", 0), number, None, lambda _: 1, leases)
        else:
            yield from self._drawn_ahead(named, leases)

    def _drawn_ahead(self, named: list[Batch], leases: Leases) -> Iterator[tuple[Batch, int]]:
        drawn: deque[int] = deque()
        exhausted = False
        while True:
            while not exhausted and len(drawn) <= self._ahead:
                ordinal = leases.draw(len(named))
                if ordinal is None:
                    exhausted = True
                else:
                    drawn.append(ordinal)
            if not drawn:
                return
            ordinal = drawn.popleft()
            if leases.begin():
                yield named[ordinal], 1


def _part(owned: dict[Batch, int], deal: Deal, before: Sequence[Sequence[int]]) -> list[Batch]:
    """As ``data/plan.py``: of what the deals before this one have left. ``owned``: whose batch is which."""
    left = list(owned)
    for done in before:
        parts = [[batch for batch in left if owned[batch] % len(done) == which] for which in range(len(done))]
        trained = {batch for part, count in zip(parts, done, strict=True) for batch in part[:count]}
        left = [batch for batch in left if batch not in trained]
    return [batch for batch in left if owned[batch] % deal.workers == deal.rank]


class Parameter:
    """``grad`` is the batches that it was computed on, since it was last cleared."""

    def __init__(self) -> None:
        self._gradient = SimpleNamespace(batches=(), _version=0)
        self.grad: Any = None

    def backward(self, batch: Batch) -> None:
        if self.grad is None:
            self._gradient.batches = ()
        self.grad = self._gradient
        self.grad.batches += (batch,)
        self.grad._version += 1

    def clear(self) -> None:
        self._gradient.batches = ()
        self.grad = None

    @property
    def batches(self) -> tuple[Batch, ...]:
        return self._gradient.batches if self.grad is not None else ()


class SimulatedExchange(Exchange):
    def __init__(self, context: Context, host: Host) -> None:
        self.parameter = Parameter()
        self.parameters: Any = [self.parameter]
        self.optimizer: Any = SimpleNamespace(
            parameter=self.parameter, state={}, register_state_dict_pre_hook=lambda _: None
        )
        self._context, self._pace, self._share = context, context.job.pace, True
        self._stepped_by: Any = SimpleNamespace() if isinstance(self._pace, Local) else self.optimizer
        self._memory: Any = SimulatedMemory(host)
        self.spec: Any = spec_of(host)
        self.inner = None
        self.was_finite = True
        self._loads = 0

    @property
    def settings(self) -> Any:
        return []

    def load_settings(self, groups: Any) -> None:
        pass

    def own_state(self) -> Any:
        return {}

    def attach(self, memory: Any, segment: int, close: Any) -> None:
        super().attach(memory, segment, close)
        if self.inner is not None:
            self.inner.own_step = self._replica.own_step  # type: ignore[attr-defined]


class SimulatedReplica:
    """A worker's end of the exchange, as engine/exchange/replica.py: what it brings is batches."""

    def __init__(
        self, claims: Claims, optimizer: Any, spec: Any, memory: SimulatedMemory, rank: int, *, views: bool
    ) -> None:
        self._claims, self._slot, self._rank = claims, memory.slots[rank], rank
        self._parameter: Parameter = optimizer.parameter
        self._own: tuple[Batch, ...] = ()  # what local steps were made of, since the parameters were last replaced

    def write_gradients(self) -> bool:
        self._write(self._parameter.batches)
        return self.has_finite_gradients()

    def has_finite_gradients(self) -> bool:
        return True

    def own_step(self) -> None:
        self._own += self._parameter.batches

    def add_gradients(self, *, first: bool) -> None:
        before = () if first else self._slot.gradient
        self._write(before + self._parameter.batches)

    def write_difference(self) -> None:
        self._write(self._own)

    def pull(self) -> None:
        self._own = ()

    def publish_parameters(self) -> None:
        self._claims.puts(self._rank)

    def publish_state(self, optimizer: Any) -> None:
        self._claims.puts(self._rank)

    def write_settings(self, optimizer: Any) -> None:
        self._claims.may_push(self._rank)

    def adopt(self) -> None:
        self.pull()

    def check_unchanged(self) -> None:
        pass

    def wait_for_device(self) -> None:
        pass

    def _write(self, batches: tuple[Batch, ...]) -> None:
        self._claims.turn()
        self._slot.gradient = None
        self._claims.turn()
        self._slot.gradient = batches


class SimulatedShards(Shards):
    """The real one's choice of the slots that count; its shards only record."""

    def __init__(self, claims: Claims, spec: Any, memory: SimulatedMemory, optimizer_class: type, source: Any) -> None:
        self._claims, self._memory = claims, memory  # type: ignore[assignment]
        self._made: dict[tuple[int, int], SimulatedShard] = {}

    def get(self, part: int, parts: int) -> Any:
        made = self._made.get((part, parts))
        if made is None:
            made = self._made[part, parts] = SimulatedShard(self._claims, self._memory, part, parts)
        return made

    def new_settings(self, shard: Any, worker: int) -> None:
        return None

    def union(self, masks: Sequence[memoryview[int]]) -> None:
        return None


class SimulatedShard:
    """A share of the parameters, as params/shard.py: two chunks. It holds on to the state that it has found."""

    def __init__(self, claims: Claims, memory: Any, part: int, parts: int) -> None:
        self._claims, self._memory, self._part, self._parts = claims, memory, part, parts
        self._folded: dict[int, tuple[Batch, ...]] = {}
        self._found: int | None = None  # how often a script had loaded the state that it holds

    def forget(self) -> None:
        self._claims.forgets()
        self._found = None

    def resume(self) -> None:
        self._found = self._claims.puts_so_far

    def follow(self) -> None:
        if self._found is None:
            self.resume()

    def fold(self, slots: Sequence[Any], weights: Sequence[float], factors: Sequence[float] = ()) -> None:
        assert set(factors) <= {1.0}
        self._folded = {}
        for slot in slots:
            self._claims.turn()
            rank = self._memory.slots.index(slot)
            assert slot.gradient is not None, f"the slot of worker {rank} is folded while it is being written"
            self._folded[rank] = slot.gradient

    def step(self, settings: None, has_gradient: None, *, rate: float = 1.0, undo: Undo, number: int) -> None:
        self._claims.begin_step(self._found)
        done = undo.begin(number)
        for chunk in range(CHUNKS):
            if done >= 2 * chunk + 2:
                continue
            if done != 2 * chunk + 1:
                undo.advance(2 * chunk + 1)
            undo.advance(2 * chunk + 2)
            self._claims.stepped(number, (self._part, self._parts, chunk), self._folded)
        self._claims.end_step()

    def norm(self, chosen: None, order: float) -> float:
        return float(sum(len(batches) for batches in self._folded.values()))

    def copy_to(self, copy: dict[int, int]) -> None:
        self._claims.turn()
        self._claims.may_copy(copy)
        copy[self._part] = self._claims.version(self._part)


class Resumed:
    """A checkpoint, as engine/checkpoint/snapshot.py: of what is the scripts' own nothing is in it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def own(self, rank: int) -> None:
        return None


class Snapshots:
    """What newcomers are told, and what is in a checkpoint, has no tensors here."""

    @staticmethod
    def shared_groups(exchanges: Any, models: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def send(channel: Any, number: int, step: int, groups: Any, documents: Any) -> None:
        if "state" in documents:
            channel.send(messages.Part(number, step, msgspec.json.encode(documents["state"])))

    @staticmethod
    def pack(groups: Any, documents: Any) -> tuple[bytes, int]:
        return msgspec.json.encode(documents), os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def unpack(layout: bytes, fd: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"kept": {}}, msgspec.json.decode(layout)


class RecordingStepper(Stepper):
    """The real one; who steps a round tells with whom it thinks that it was closed."""

    def __init__(self, claims: Claims, shards: Shards, memory: Any) -> None:
        super().__init__(shards, memory)
        self._claims = claims

    def step(self, number: int, contributors: tuple[int, ...], share: int, shares: int) -> None:
        self._claims.agrees(number, contributors, share, shares)
        super().step(number, contributors, share, shares)


class RecordingApplier(Applier):
    """The real one, which tells what it is about to do."""

    def __init__(self, claims: Claims, spec: Any, shards: Shards, memory: Any) -> None:
        super().__init__(spec, shards, memory)
        self._claims = claims

    def _step(self, shard: Any, part: int, entry: Entry) -> None:
        self._claims.applies(part, entry)
        super()._step(shard, part, entry)


def job_of(plan: Plan) -> Job:
    return Job(
        "simulated",
        plan.workers,
        plan.servers,
        max_workers=plan.places,
        max_servers=plan.server_places or None,
        pace=plan.pace,
        assign="lease" if plan.leased else "round_robin",
        checkpoint_every=plan.checkpoint_every,
    )


def spec_of(host: Host) -> Any:
    return SimpleNamespace(
        workers=host.workers, servers=host.servers, parts=host.parts, damping=False, compensate=0, hosts=1
    )


def serve(host: Host, claims: Claims, rank: int, channel: int) -> None:
    """engine/exchange/server.py's ``serve`` with one exchange, which is there from the beginning."""
    board, memory, spec = SimulatedBoard(host), SimulatedMemory(host), spec_of(host)
    shards = SimulatedShards(claims, spec, memory, type(None), {})
    stepper, applier = RecordingStepper(claims, shards, memory), RecordingApplier(claims, spec, shards, memory)
    one: Any = server.Served(spec, memory, 1, stepper, applier)  # type: ignore[arg-type]
    board.ring(board.workers + rank)
    while True:
        answer: Any = board.wait(lambda: server.next_turn(board, [one], rank, channel))
        if answer in ("message", "leave"):
            claims.met["a server has left"] += answer == "leave"
            return
        _, number, what = answer
        if isinstance(what, tuple):
            server.step(board, one, number, what, rank)
        else:
            applier.apply(number, what)
            board.ring(board.workers + rank)


@contextmanager
def in_place(host: Host, claims: Claims, ring: int) -> Iterator[None]:
    """The kernel and the tensors are the simulation's, until the block is left; rings of leases are so long."""
    with (
        patch.object(board_module, "futex", Futexes(host)),
        patch.object(handover, "snapshot", Snapshots),
        patch.object(saving, "snapshot", Snapshots),
        patch.object(catching_up, "Resumed", lambda _: Resumed(host.resumed)),
        patch.object(worker_module, "Resumed", lambda _: Resumed(host.resumed)),
        patch.object(ledger, "RING", ring),
        patch.object(ledger, "_WORKER", ledger._WORKER - ledger.RING + ring),
        patch.object(exchange_module, "Replica", partial(SimulatedReplica, claims)),
        patch.object(exchange_module, "Shards", partial(SimulatedShards, claims)),
        patch.object(exchange_module, "Applier", partial(RecordingApplier, claims)),
        patch.object(exchange_module, "Stepper", partial(RecordingStepper, claims)),
    ):
        yield
