"""The launcher's hands: what its coordinator says is done, to processes, memory and the board.

Another launcher may do it once more: a process is forked once a birth, memory is made once a number, a death has its
count. What is long done (``Channels.silent``) is only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from paceline import errors, events
from paceline.engine.launcher.channels import Channels
from paceline.engine.launcher.memories import Memories
from paceline.engine.launcher.processes import Processes
from paceline.engine.launcher.telling import Failure, Telling
from paceline.protocol import messages
from paceline.protocol.coordinator import Coordinator
from paceline.protocol.effects import (
    Abort,
    Allocate,
    AskToLeave,
    Done,
    Effect,
    Give,
    GiveUp,
    Open,
    Replace,
    Serve,
    Tell,
)
from paceline.transport.board import Board

FINISHED = messages.Stop("all workers have finished")  # to servers
_GRACE_S = 2.0  # between telling processes to stop and killing them


class Hands:
    """``note`` has something come to the launcher that it has found out itself."""

    def __init__(
        self,
        coordinator: Coordinator,
        board: Board,
        memories: Memories,
        channels: Channels,
        processes: Processes,
        telling: Telling,
        note: Callable[[messages.Any], None],
    ) -> None:
        self._coordinator, self._board, self._memories, self._channels = coordinator, board, memories, channels
        self._processes, self._telling, self._note = processes, telling, note
        self._died: Counter[int] = Counter()  # processes of a worker
        self.failure: Failure | None = None  # of the run
        self.done = False  # have all workers finished?

    def do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Allocate():
                    self._allocate(effect)
                case Give(rank=rank, number=number):
                    memory, fd = self._memories[number]
                    self._channels.send(("worker", rank), memory, (fd,))
                case Replace(rank=rank, role="server") | Open(rank=rank, role="server"):
                    self._processes.fork("server", rank)
                case Replace(rank=rank):
                    self._tell_death(rank, for_good=False)
                    self._processes.fork("worker", rank)
                case Open(rank=rank):
                    self._died[rank] += 1  # to the others it is as if one had
                    if not self._channels.silent:
                        self._board.open_place(rank, self._memories.newest, deaths=self._died[rank])
                    self._processes.fork("worker", rank)
                case Serve(crew=crew, kept=kept):
                    if not self._channels.silent:
                        self._board.set_servers(crew, kept)
                    if self._telling.info.servers != self._coordinator.wanted_servers:
                        self.tell_numbers()
                case AskToLeave(rank=rank):
                    if not self._channels.silent:
                        self._board.ask_to_leave(rank)
                case GiveUp(rank=rank):
                    self._tell_death(rank, for_good=True)
                    if not self._channels.silent:
                        self._board.want(self._coordinator.wanted)
                case Tell(kind=kind, text=text, role=role, rank=rank):
                    self._telling.note(kind, text, role, rank)
                case Abort(role=role, rank=rank, failure=failure):
                    self._abort(role, rank, failure)
                case Done():
                    self.done = True
                    self._channels.send_all(("server",), FINISHED)
                    if not self._channels.silent:
                        self._board.wake_all()

    def fail(self, role: str, rank: int, failure: messages.Failed) -> None:
        """The run has failed by this, if by nothing before."""
        self.failure = self.failure or (role, rank, failure)

    def tell_numbers(self) -> None:
        """In the run's files: how many workers and servers there are to be."""
        self._telling.write_numbers(self._coordinator.wanted, self._coordinator.wanted_servers)

    def _tell_death(self, rank: int, *, for_good: bool) -> None:
        self._died[rank] += 1
        self._telling.merger.lost(rank)
        if not self._channels.silent:
            self._memories.mend()
            self._board.tell_death(rank, for_good=for_good, deaths=self._died[rank])

    def _allocate(self, effect: Allocate) -> None:
        if self._channels.silent:
            return
        request = effect.request
        try:
            self._memories.make(request)
        except errors.HostError as error:
            # The coordinator must know why workers leave.
            self._note(messages.Failed("HostError", error.what, error.why, error.fix))
            return
        memory, fd = self._memories[request.number]
        # Servers first: they are ready when the first push comes.
        if effect.servers:
            self._channels.send_all(("server",), memory, (fd,))
        for rank in effect.workers:
            self._channels.send(("worker", rank), memory, (fd,))
        if request.kind == "exchange":
            optimizer, _, rest = request.what.partition(" over ")
            size_bytes = self._memories.size_bytes(request.number)
            self._telling.record(events.Wrapped(self._telling.at_s, int(rest.split()[0]), size_bytes, optimizer))

    def _abort(self, role: str, rank: int, failure: messages.Failed) -> None:
        self.fail(role, rank, failure)  # what we kill dies of us
        if not self._channels.silent:
            self._board.set_abort()
        self._channels.send_all(("server", "worker"), messages.Stop(failure.what))
        self._processes.end_within(_GRACE_S)
