"""Pictures of a run, drawn from its files. Knows no engine; needs no screen and changes no global state."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.report.series import Bin, final_loss, read_series, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, LINE = "#22272e", "#7a828c", "#1f5fa8"
SHARES = {"computing": "#9dc3a5", "exchanging": "#f0c36d", "waiting": "#d98880"}
LOG_RATIO = 30.0  # a loss that falls by more than this factor is drawn on a logarithmic axis


def loss_plot(directory: Path) -> Path | None:
    """Draws metrics.jsonl into plots/loss.png and returns its path; None if fewer than 2 losses were logged.

    The faint line is the loss of every round (a band from lowest to highest where rounds are drawn
    together), the strong one its running mean; below it how the workers' time divides.
    """
    bins = read_series(directory / "metrics.jsonl")
    if sum(bin.losses > 0 for bin in bins) < 2:
        return None
    # Here and not above: matplotlib takes most of a second to import. Its object interface leaves the
    # backend and the figures of a script in the same process alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    _draw_loss(top, bins)
    _draw_shares(bottom, bins)
    top.set_title(directory.resolve().name, loc="left", fontsize=11, color=INK)
    bottom.set_xlabel("step", color=INK)
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlim(bins[0].step, max(bins[-1].step, bins[0].step + 1))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
    path = directory / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return path


def _draw_loss(axes: Axes, bins: list[Bin]) -> None:
    drawn = [bin for bin in bins if bin.losses]
    steps, losses = [bin.step for bin in drawn], [bin.loss for bin in drawn]
    logarithmic = min(bin.low for bin in drawn) > 0 and max(losses) / min(losses) > LOG_RATIO
    mean = [exp(y) for y in smoothed([log(y) for y in losses])] if logarithmic else smoothed(losses)
    if any(bin.losses > 1 for bin in drawn):
        lows, highs = [bin.low for bin in drawn], [bin.high for bin in drawn]
        axes.fill_between(steps, lows, highs, color=LINE, alpha=0.12, linewidth=0)
    axes.plot(steps, losses, color=LINE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, mean, color=LINE, linewidth=1.8)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylabel("loss", color=INK)
    note = f"{final_loss(bins):#.3g}: mean of the last 5 % of {bins[-1].step:,} steps"
    axes.set_title(note, loc="right", fontsize=10, color=LINE)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_shares(axes: Axes, bins: list[Bin]) -> None:
    """Shares of each bin's time, stacked to 100 %, the useful part at the bottom."""
    totals = [bin.computing_s + bin.exchanging_s + bin.waiting_s or 1.0 for bin in bins]
    rows = {
        "computing": [bin.computing_s for bin in bins],
        "exchanging": [bin.exchanging_s for bin in bins],
        "waiting": [bin.waiting_s for bin in bins],
    }
    shares = [smoothed([100 * part / total for part, total in zip(row, totals, strict=True)]) for row in rows.values()]
    axes.stackplot([bin.step for bin in bins], *shares, colors=list(SHARES.values()), linewidth=0)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 100])
    axes.set_ylabel("% of time", color=INK, fontsize=9)
    whole = sum(totals)
    labels = [f"{name} {100 * sum(row) / whole:.0f} %" for name, row in rows.items()]
    axes.legend(
        axes.collections, labels, ncols=3, frameon=False, fontsize=8, labelcolor=INK,
        loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, handlelength=1.0,
    )  # fmt: skip
