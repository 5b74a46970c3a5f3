"""Which servers step a round, or apply an entry of the log: the first so many, as one word that tells crews apart.

A crew may be as large as one before it. Its number tells them apart, so that a server which is to leave knows that what
it sees was pushed by somebody who knew (docs/decisions/0019).
"""

from __future__ import annotations

_SIZE_BITS = 16


def crew_word(number: int, size: int) -> int:
    """The run's crew ``number``, of so many servers."""
    return number << _SIZE_BITS | size


def crew_size(crew: int) -> int:
    """How many servers step; 0 where workers do."""
    return crew & (1 << _SIZE_BITS) - 1
