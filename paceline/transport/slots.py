"""The memory of one exchange: an optimizer's parameters, its state, and a slot for every worker.

    words   pushed[worker], stepped[member]: the round each has pushed, and has stepped its share of; asked[worker],
            answered[worker]: the same for norms; loads[0]: checkpoints loaded over what is here; since[worker]: the
            first round, or entry of the log, that the process counts in which is this worker now; attached[worker]:
            how many have been this worker before it; crew[0]: by how many servers the last round was stepped;
            ready[worker]: which of its next gradient is in its slot before it is pushed (engine/elsewhere/early.py);
            offered[worker], brought[worker]: of workers on one host that push as one (protocol/hosts.py);
            fetched[0]: how often home was to have what servers elsewhere have, fetched[1 + server]: so often has it
            ``workers`` and ``servers`` are how many places there are, most of them unused
    undo    an area for each who steps (of each part, where there are parts): params/undo.py
    log     where there are parts (paces quorum, bounded, async): the log (protocol/log.py), applied[part], and
            clocks[worker], steps each has finished
    state   the optimizer's state (params/state.py)
    params  the table's flat vectors: the parameters, once on this host
    stamps  by table with sparse rows, if they are kept: in which round, or entry, each row was stepped last
    slots   by worker: a header (weight, loss sums, stop, crew, settings, mask), the row numbers of sparse gradients,
            the flat gradient, and where there are parts the worker's own copy of the parameters

Parameters whose gradients are sparse rows are not copied: tables are large and a step touches few of their rows, so
with parts, too, workers compute on the one set of them, while others' turns write rows (Hogwild, Recht et al. 2011).

A worker writes its slot, then its ``pushed`` word: that store *is* the push. With parts it is the log's entry. A slot
has one writer; it is read between the closing of its round and the last ``stepped`` of it (or its entry's last
``applied``), and not written in that time. The copy is written by who applies an entry of the worker's.
"""

from __future__ import annotations

import msgspec
import torch

from paceline.params.optimizers import StateItem
from paceline.params.state import State, StatePlan
from paceline.params.table import Table, lay_out, vector_dtype
from paceline.params.undo import BLOCK_VALUES, HEADER_WORDS, Undo, area_bytes
from paceline.protocol import log
from paceline.protocol.partition import Piece, deal, grid
from paceline.transport import futex
from paceline.transport.journal import Journal
from paceline.transport.segment import PAGE, Memory, address, page_up

_WORD = 8
_HEADER_WORDS = 32  # two halves of eight words, settings' version and length, a norm, factors, places in the data
_SETTINGS, _NORM, _FACTORS, _PLACES = 16, 18, 20, 24
_COUNT_BITS = 16


def _half(number: int) -> int:
    return number % 2 * 8


class Spec(msgspec.Struct, frozen=True):
    """All that must be equal in every process of an exchange; its bytes are compared and sent to servers.

    ``settings`` is the groups' hyper-parameters as they are stepped, encoded; a slot has room for
    ``settings_bytes`` of them. ``whole``: parameters are never cut. ``workers``, ``servers``: places for so many.
    ``shares``: what the grid is made for; ``hosts``: on how many the servers are. ``parts``: into how many the
    parameters are cut for good; 0 where each round cuts them anew. ``damping`` and ``compensate`` are what is done
    about stale gradients (engine/exchange/applier.py). ``stamps``: is it kept when rows of tables were stepped?
    """

    table: Table
    optimizer: str
    whole: bool
    settings: bytes
    settings_bytes: int
    state: tuple[StateItem, ...]
    workers: int
    servers: int
    parts: int = 0
    damping: bool = False
    compensate: float = 0.0
    shares: int = 0
    hosts: int = 1
    stamps: bool = False

    @property
    def seats(self) -> int:
        """How many shares there are at most: of the parts that are cut for good, of the servers, or of the workers."""
        return self.parts or self.servers or self.workers

    @property
    def blocks(self) -> tuple[Piece, ...]:
        """The grid that the parameters are cut into."""
        entries = self.table.entries
        sizes, grains = [entry.size for entry in entries], [entry.grain for entry in entries]
        tables = {param for param, entry in enumerate(entries) if entry.row}
        return grid(
            sizes,
            self.parts or self.shares or self.seats,
            most=BLOCK_VALUES,
            whole=self.whole,
            grains=grains,
            tables=tables,
        )

    def cut(self, parts: int) -> tuple[tuple[Piece, ...], ...]:
        """The blocks as shares."""
        return deal(self.blocks, parts)


class _Offsets:
    def __init__(self, spec: Spec) -> None:
        count = len(spec.table.entries)
        vectors = spec.table.offsets_bytes()
        self.plan = StatePlan(spec.table, spec.state, spec.blocks)
        self.headers = (9 * spec.workers + 2 * spec.servers + 3 + 7) // 8 * 8
        self.log = page_up((self.headers + spec.seats * HEADER_WORDS) * _WORD)
        self.log_words = log.words_needed(spec.workers) if spec.parts else 0
        self.state = page_up(self.log + (self.log_words + spec.parts + spec.workers) * _WORD)
        self.undo = page_up(self.state + self.plan.size_bytes)
        self.undo_bytes = page_up(area_bytes(spec.table, self.plan))
        self.params = self.undo + spec.seats * self.undo_bytes
        self.stamps: dict[int, int] = {}
        place = self.params + vectors[""]
        for param, entry in enumerate(spec.table.entries):
            if entry.row and spec.stamps:
                self.stamps[param] = page_up(place)
                place = self.stamps[param] + entry.rows * _WORD
        self.slots = page_up(place)
        self.mask = _HEADER_WORDS * _WORD
        self.chosen = self.mask + -(-count // 64) * 64
        self.settings = self.chosen + -(-count // 64) * 64
        place = self.settings + -(-spec.settings_bytes // _WORD) * _WORD
        self.rows: dict[int, int] = {}  # parameter -> its row numbers
        for param, entry in enumerate(spec.table.entries):
            if entry.row:
                self.rows[param] = place
                place += (entry.rows + 1) * _WORD
        self.gradient = page_up(place)
        self.copy = page_up(self.gradient + vectors[""])
        copied = lay_out(spec.table.dense_sizes)[""]
        self.slot_bytes = page_up(self.copy + copied) if spec.parts else self.copy
        self.end = self.slots + spec.workers * self.slot_bytes


def size_bytes(spec: Spec) -> int:
    """How large the segment of this exchange must be."""
    return max(_Offsets(spec).end, PAGE)


def by_place(spec: Spec) -> tuple[tuple[int, int, int], ...]:
    """Which ranges of it belong to single workers."""
    offsets = _Offsets(spec)
    slots = (offsets.slots, offsets.slot_bytes, spec.workers)
    return (slots,) if spec.parts or spec.servers else (slots, (offsets.undo, offsets.undo_bytes, spec.workers))


class Slot:
    """One worker's slot. ``gradient`` is the table's flat vectors, padded with zeros; ``mask`` tells which
    parameters have one, ``chosen`` which of them a norm is asked of: one byte a parameter. ``rows[param]`` is
    int64[rows + 1] where the gradient is sparse rows (params/rows.py). ``copy`` is the worker's own parameters, flat
    like the gradient, without those of sparse rows; empty where all workers share them."""

    def __init__(self, memory: Memory, start: int, offsets: _Offsets, spec: Spec) -> None:
        self._words = memoryview(memory)[start : start + offsets.mask].cast("Q")
        self._floats = memoryview(memory)[start : start + offsets.mask].cast("d")
        count = len(spec.table.entries)
        self.mask = memoryview(memory)[start + offsets.mask : start + offsets.mask + count]
        self.chosen = memoryview(memory)[start + offsets.chosen : start + offsets.chosen + count]
        settings = start + offsets.settings
        self._settings = memoryview(memory)[settings : settings + spec.settings_bytes]
        self._settings_bytes = spec.settings_bytes
        self.rows = {
            param: _carve(memory, torch.int64, start + place, spec.table.entries[param].rows + 1)
            for param, place in offsets.rows.items()
        }
        self.gradient = carve_vectors(memory, start + offsets.gradient, spec.table.sizes)
        self.copy = carve_vectors(memory, start + offsets.copy, spec.table.dense_sizes) if spec.parts else {}

    def pushed_in(self, number: int) -> bool:
        """Did this worker contribute to round ``number``, the one in progress or the last?"""
        return self._words[_half(number)] == number

    def write_pushed_in(self, number: int) -> None:
        """This worker contributed to that round, the last of a run that is resumed: no more is known of it."""
        self._words[_half(number)] = number

    def weight(self, number: int) -> float:
        return self._floats[_half(number) + 1]

    def loss(self, number: int) -> tuple[float, float]:
        """Sum of loss times samples, and of samples, since the last look (protocol/stopping.py)."""
        half = _half(number)
        return self._floats[half + 2], self._floats[half + 3]

    def steps(self, number: int) -> int:
        """How many local steps are in the push."""
        return self._words[_half(number) + 5]

    def place(self, number: int) -> tuple[int, int]:
        """How far into its data the worker was with the push: (pass, position), see ``Worker._settle_place``."""
        words = self._words
        for start in (_PLACES, _PLACES + 3):
            if number and words[start] == number:
                return words[start + 1], words[start + 2]
        return (0, 0)

    def stop(self, number: int) -> bool:
        """Does this worker ask that the round be the last?"""
        return self._words[_half(number) + 4] != 0

    def crew(self, number: int) -> int:
        """By which servers the round is stepped, if this worker is the lowest in it (protocol/crew.py)."""
        return self._words[_half(number) + 6]

    def write_weight(self, number: int, weight: float) -> None:
        self._floats[_half(number) + 1] = weight

    def factor(self, number: int) -> float:
        """By what the gradient counts, beside its weight: clipping has the script's be that times this."""
        return self._floats[_FACTORS + number % 2] or 1.0

    def is_as_measured(self, number: int) -> bool:
        """Is it, but for the factor, the gradient of which a norm was asked in this round?"""
        return self._floats[_FACTORS + number % 2] > 0

    def write_factor(self, number: int, factor: float | None) -> None:
        """Above 0; None: it is not the gradient of which a norm was asked, or none was."""
        self._floats[_FACTORS + number % 2] = factor or 0.0

    def lies_in(self, number: int) -> int | None:
        """Whose slot has what this worker pushed in round ``number``, folded with others'; None: it lies here."""
        return self._words[_half(number) + 7] - 1 if self._words[_half(number) + 7] else None

    def write_lies_in(self, number: int, worker: int | None) -> None:
        self._words[_half(number) + 7] = 0 if worker is None else worker + 1

    def write(
        self,
        number: int,
        weight: float,
        loss: tuple[float, float],
        stop: bool,
        steps: int = 1,
        place: tuple[int, int] = (0, 0),
        crew: int = 0,
        factor: float | None = None,
    ) -> None:
        """The header of a push. There are two, for even rounds and odd ones: when a round is over, a fast worker may
        push the next before a slow one has looked at this one's headers; further ahead nobody can be."""
        half = _half(number)
        self._floats[half + 1], self._floats[half + 2], self._floats[half + 3] = weight, *loss
        self._words[half + 4], self._words[half + 5], self._words[half + 6] = stop, steps, crew
        self._words[half + 7] = 0
        self.write_factor(number, factor)
        self._words[half] = number
        # A worker that was not in the round between writes over the header of its last push, and may die before this
        # one is pushed. How far that one was stays.
        words = self._words
        start = _PLACES + (3 if words[_PLACES] > words[_PLACES + 3] else 0)
        words[start] = 0
        words[start + 1], words[start + 2] = place
        words[start] = number

    @property
    def norm(self) -> float:
        """This worker's part of a norm."""
        return self._floats[_NORM]

    def write_norm(self, value: float) -> None:
        self._floats[_NORM] = value

    @property
    def settings_version(self) -> int:
        return self._words[_SETTINGS]

    @property
    def settings(self) -> bytes:
        return bytes(self._settings[: self._words[_SETTINGS + 1]])

    def write_settings(self, data: bytes) -> None:
        assert len(data) <= self._settings_bytes, f"settings of {len(data)} bytes in room for {self._settings_bytes}"
        self._settings[: len(data)] = data
        self._words[_SETTINGS + 1] = len(data)
        self._words[_SETTINGS] += 1


class ExchangeMemory:
    """A view of an exchange's segment, laid out by ``spec``; equal in every process that maps it."""

    def __init__(self, memory: Memory, spec: Spec) -> None:
        offsets = _Offsets(spec)
        assert len(memory) >= offsets.end, "the segment is smaller than its spec"
        self._memory, self._offsets, self._pinned = memory, offsets, False
        words = memoryview(memory)[: offsets.log].cast("Q")
        self.pushed = words[: spec.workers]
        members = spec.workers + spec.servers
        self.stepped = words[spec.workers : spec.workers + members]
        norms = spec.workers + members
        self.asked = words[norms : norms + spec.workers]
        self.answered = words[norms + spec.workers : norms + 2 * spec.workers]
        self._loads_at = norms + 2 * spec.workers
        self.loads: log.Words = words[self._loads_at : self._loads_at + 1]
        self.since = words[self._loads_at + 1 : self._loads_at + 1 + spec.workers]
        self.attached = words[self._loads_at + 1 + spec.workers : self._loads_at + 1 + 2 * spec.workers]
        self.crew = words[self._loads_at + 1 + 2 * spec.workers : self._loads_at + 2 + 2 * spec.workers]
        self._ready_at = self._loads_at + 2 + 2 * spec.workers
        self.ready = words[self._ready_at : self._ready_at + spec.workers]
        hosts = self._ready_at + spec.workers
        self.offered = words[hosts : hosts + spec.workers]
        self.brought = words[hosts + spec.workers : hosts + 2 * spec.workers]
        fetched = hosts + 2 * spec.workers
        self.fetched = words[fetched : fetched + 1 + spec.servers]
        entries = memoryview(memory)[offsets.log : offsets.state].cast("Q")
        self.log = log.Log(entries[: offsets.log_words], spec.workers)
        self._log_at = offsets.log // _WORD
        self.applied = entries[offsets.log_words : offsets.log_words + spec.parts]
        clocks = offsets.log_words + spec.parts
        self.clocks = entries[clocks : clocks + spec.workers]
        self.params = carve_vectors(memory, offsets.params, spec.table.sizes)
        self.stamps = {
            param: _carve(memory, torch.int64, start, spec.table.entries[param].rows)
            for param, start in offsets.stamps.items()
        }
        self.state = State(
            spec.table,
            offsets.plan,
            lambda dtype, offset, count: _carve(memory, dtype, offsets.state + offset, count),
        )
        self.undo = [
            Undo(
                words[offsets.headers + seat * HEADER_WORDS : offsets.headers + (seat + 1) * HEADER_WORDS],
                _carve(memory, torch.uint8, offsets.undo + seat * offsets.undo_bytes, offsets.undo_bytes),
            )
            for seat in range(spec.seats)
        ]
        self.slots = [
            Slot(memory, offsets.slots + worker * offsets.slot_bytes, offsets, spec) for worker in range(spec.workers)
        ]

    def state_bytes(self) -> torch.Tensor:
        """The optimizer's state as it lies in memory (an alias)."""
        return _carve(self._memory, torch.uint8, self._offsets.state, self._offsets.plan.size_bytes)

    def tell_ready(self, worker: int, number: int, count: int) -> None:
        """The first ``count`` buckets of what this worker is going to push in round ``number`` are in its slot."""
        self.ready[worker] = number << _COUNT_BITS | count
        futex.wake(self._ready_address(worker))

    def count_ready(self, worker: int, number: int) -> int:
        """As it was told; 0 for another round."""
        word = self.ready[worker]
        return word & (1 << _COUNT_BITS) - 1 if word >> _COUNT_BITS == number else 0

    def await_ready(self, worker: int, seen: int, timeout_s: float) -> None:
        """Sleep while the word ``ready[worker]`` is ``seen``; may return early."""
        futex.wait(self._ready_address(worker), seen & 0xFFFFFFFF, timeout_s)

    def wake_ready(self, worker: int) -> None:
        """Wake who sleeps there, though nothing has changed."""
        futex.wake(self._ready_address(worker))

    def await_word(self, words: memoryview[int], place: int, seen: int, timeout_s: float) -> None:
        """Sleep while ``words[place]``, of a column of this memory, is ``seen``; may return early."""
        futex.wait(address(words) + place * _WORD, seen & 0xFFFFFFFF, timeout_s)

    def tell_word(self, words: memoryview[int], place: int, value: int) -> None:
        """Write it, and wake who sleeps there."""
        words[place] = value
        self.wake_word(words, place)

    def wake_word(self, words: memoryview[int], place: int) -> None:
        """Have who sleeps there look again."""
        futex.wake(address(words) + place * _WORD)

    def _ready_address(self, worker: int) -> int:
        return address(self._memory) + (self._ready_at + worker) * _WORD

    def keep_journal(self, journal: Journal, segment: int) -> None:
        """From now on this process changes the log under the lock, and what it changes is journaled."""
        journal.map(segment, memoryview(self._memory).cast("Q"))
        self.loads = journal.watch(segment, self._loads_at, self._loads_at + 1)
        size = len(self.log.words)
        if size:
            kept = journal.watch(segment, self._log_at, self._log_at + size)
            self.log = log.Log(self.log.words, len(self.slots), kept)

    def pin(self, rank: int) -> None:
        """Lock what a worker copies from and to for CUDA, so that copies from and to a GPU need no staging and can be
        queued: the parameters, and its own slot."""
        if not self._pinned:
            self._pinned = True
            offsets, start = self._offsets, address(self._memory)
            own = offsets.slots + rank * offsets.slot_bytes
            for first, stop in ((offsets.params, offsets.slots), (own, own + offsets.slot_bytes)):
                if stop > first:
                    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(start + first, stop - first, 0))


def carve_vectors(memory: Memory, start: int, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Flat vectors of these sizes (``Table.sizes``), as aliases of ``memory`` from byte ``start``."""
    places = lay_out(sizes)
    return {key: _carve(memory, vector_dtype(key), start + places[key], size) for key, size in sizes.items()}


def _carve(memory: Memory, dtype: torch.dtype, offset: int, count: int) -> torch.Tensor:
    if count == 0:
        return torch.zeros(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, offset=offset, count=count)
