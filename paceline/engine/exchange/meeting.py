"""What goes into a meeting of workers, and what comes of it; ``rounds.py`` and ``arrivals.py`` are its two kinds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Push:
    """What goes with a gradient: samples behind it, (sum of loss x samples, samples) not told yet, whether this
    worker asks that the round be the last, how many local steps are in it, how far into its data the worker is, and its
    ``factor`` (``Slot.factor``)."""

    weight: float
    loss: tuple[float, float]
    stop: bool
    steps: int = 1
    place: tuple[int, int] = (0, 0)
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What a meeting was: its number, who contributed, how long this worker waited (seconds), and the staleness of its
    gradient (steps). ``counted`` is False where it was not used: it came too late, or training was ``over``.

    ``number`` is that of the round, or of the version the push made.
    """

    number: int
    contributors: tuple[int, ...]
    waiting_s: float
    staleness: int = 0
    counted: bool = True
    over: bool = False
