"""How numbers are written for people: durations, sizes, counts, losses. Pure functions."""

from __future__ import annotations

import math
import os
from pathlib import Path


def duration(seconds: float) -> str:
    """``0:58``, ``12:03``, ``3:12:03``; a run under ten seconds keeps a decimal: ``4.2 s``."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None) -> str:
    """Whatever a script has logged: a whole number as such, others as a loss."""
    if value is not None and math.isfinite(value) and value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}"
    return loss(value)


def loss(value: float | None) -> str:
    """Three significant digits, in the shape of a loss: ``1.98``, ``0.0312``, ``12,400``, ``3.10e-06``."""
    if value is None:
        return "-"
    if math.isfinite(value) and abs(value) >= 999.5:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.3g}".removesuffix(".")


def rate(per_s: float) -> str:
    """Samples per second, to three digits: ``3,900``, ``27.4``."""
    if not math.isfinite(per_s) or per_s <= 0:
        return "-"
    if per_s < 100:
        return f"{per_s:.3g}"
    return f"{round(per_s, 2 - math.floor(math.log10(per_s))):,.0f}"


def size(count_bytes: int) -> str:
    """``13.2 MB``: decimal units, three digits."""
    value, units = float(count_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def count(value: int) -> str:
    """``1.6 M``, ``650``: a number of parameters."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)


def percent(share: float) -> str:
    """A share from 0 to 1, to a whole per cent; what is more than nothing is never written as 0."""
    if 0 < share < 0.005:
        return "<1 %"
    return f"{100 * share:.0f} %"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shown(path: Path) -> str:
    """A path as short as it can be typed from here: relative if it lies below, else absolute."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)
