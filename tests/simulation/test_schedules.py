"""Thousands of schedules, and that they reach what the claims are about. ``python -m tests.simulation`` runs more."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.__main__ import run
from tests.simulation.mutants import mutants, try_out
from tests.simulation.plans import WORLDS

SEEDS = 2000
BLOCK = 100
REACHED = (
    "killed under the lock",
    "killed asleep",
    "killed in a step",
    "killed with others",
    "killed before it joined",
    "killed again",
    "given up",
    "another deal",
    "a round without some",
    "a share stepped for another",
    "leased",
    "servers",
    "naps",
    "rings that are soon full",
    "resumed",
    "resumed with others",
    "a checkpoint of the script's own",
    "sync",
    "local",
    "quorum",
    "bounded",
    "async",
)


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_what_is_claimed_holds_under_any_schedule(first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(WORLDS[seed % len(WORLDS)], seed)


@pytest.mark.parametrize(
    ("world", "seed"),
    [
        ("rounds", 29878),
        ("log", 30257),
        ("log", 30759),
        ("rounds", 400284),
        ("rounds", 401480),
        ("rounds", 402032),
        ("rounds", 501896),
        ("log", 600059),
        ("rounds", 600110),
        ("rounds", 800706),
        ("rounds", 801262),
        ("rounds", 922148),
        ("rounds", 3208788),
        ("log", 5308541),
        ("log", 5308825),
        ("log", 5401841),
        ("rounds", 5251900),
    ],
)
def test_what_once_failed_holds(world: str, seed: int) -> None:
    run(world, seed)


def test_schedules_reach_what_the_claims_are_about() -> None:
    """Kills in all states, several at once, of newcomers; workers given up; rounds without some; all paces."""
    met: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = run(WORLDS[seed % len(WORLDS)], seed)
        met.update(world.met)
        met.update([str(world.plan.pace).partition(":")[0]])
        if min(met[what] for what in REACHED) >= 2:
            return
    raise AssertionError({what: met[what] for what in REACHED})


@pytest.mark.parametrize(
    "name",
    [
        "rounds.close_round: seen[worker] >= number is flipped",
        "rounds.holding: board.gone[worker] != LEFT is flipped",
        "rounds.all_stepped: rescuer == me is flipped",
        "log.Log.append: kept[_APPENDED] = number is dropped",
        "log.Log.offer: self._kept[_OFFERED + worker // 64] |= 1 << worker % 64 is dropped",
        "ledger.Ledger.give_back: words[_RETURNED] += 1 is dropped",
        "ledger.Ledger.commit: words[start + _FIRST] = stop is dropped",
    ],
)
def test_a_mutant_of_the_protocol_is_caught(name: str) -> None:
    mutant = next(one for one in mutants() if one.name == name)
    assert try_out(mutant, seeds=300), f"{name}: nothing was seen in 300 schedules"
