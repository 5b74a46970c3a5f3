"""What home tells a server elsewhere can be decoded, and yet cannot be: why, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from paceline.protocol.mirrors import mistaken
from paceline.protocol.ranges import SHARE, Apply, Step


@dataclass(frozen=True)
class Sizes:
    """Of an exchange: places for workers, parameters, into how many parts it is cut for good (0: into none), and how
    much room there is for settings."""

    workers: int
    parameters: int
    parts: int
    settings_bytes: int


def mistaken_step(told: Step, sizes: Sizes, done: Mapping[int, int]) -> str | None:
    """Why this round cannot be stepped, or None. ``done``: by part that the server has, what has been."""
    follow = told.follow
    if sizes.parts:
        return f"round {follow.number} of an exchange that is stepped as entries of the log come"
    if follow.number <= done[SHARE]:
        return f"round {follow.number} behind round {done[SHARE]}"
    for worker, weight, factor, _ in follow.sources:
        if not math.isfinite(weight) or factor <= 0:
            return f"what worker {worker} has pushed, with weight {weight} and factor {factor}"
    return mistaken(follow, sizes.workers, sizes.parameters, sizes.settings_bytes)


def mistaken_apply(told: Apply, sizes: Sizes, done: Mapping[int, int]) -> str | None:
    """Why this entry cannot be applied, or None. ``done``: as for a step."""
    if not sizes.parts:
        return f"entry {told.number} of an exchange that is stepped in rounds"
    if told.part not in done:
        return f"an entry to part {told.part}; here are parts {sorted(done)} of {sizes.parts}"
    if told.number <= done[told.part]:
        return f"entry {told.number} to part {told.part}, behind entry {done[told.part]}"
    members = [member[0] for member in told.members]
    for what, ranks in (("push of", members), ("copy for", told.workers)):
        if len(set(ranks)) < len(ranks) or max(ranks, default=0) >= sizes.workers:
            return f"a {what} workers {list(ranks)} of {sizes.workers}"
    if not told.workers:
        return "an entry that nobody gets a copy of"
    if told.settings and not members:
        return "settings, and nobody who has them"
    for worker, _, weight, mask in told.members:
        if not math.isfinite(weight) or len(mask) != sizes.parameters:
            return f"{len(mask)} gradients of worker {worker} for {sizes.parameters} parameters, with weight {weight}"
    if len(told.settings) > sizes.settings_bytes:
        return f"settings of {len(told.settings)} bytes in room for {sizes.settings_bytes}"
    return None
