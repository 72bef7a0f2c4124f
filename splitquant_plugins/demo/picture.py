"""The demo's figures as a picture: plain and split beside FP32, a pair of bars for each target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from splitquant_plugins.demo.findings import Row, pairs
from splitquant_plugins.evaluation.pictures import COLOURS, FAINT, INK, new_figure, require_matplotlib, save_figure

PLAIN, SPLIT = FAINT, COLOURS[0]


def draw_accuracy(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG of the accuracy of every target, plain and split."""
    require_matplotlib()
    found = pairs(rows)
    figure = new_figure(7.2, 1.3 + 0.75 * len(found))
    axes = figure.add_axes((0.34, 0.16, 0.58, 0.62))
    for place, (plain, split) in enumerate(reversed(found)):
        for row, colour, offset in ((plain, PLAIN, 0.19), (split, SPLIT, -0.19)):
            axes.barh(place + offset, 100 * row["accuracy"], height=0.34, color=colour)
            axes.text(
                100 * row["accuracy"] - 1,
                place + offset,
                f"{100 * row['accuracy']:.1f}",
                color="white",
                ha="right",
                va="center",
                fontsize=8,
            )
    axes.axvline(100 * rows[0]["fp32_accuracy"], color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(found)), [_label(plain) for plain, _ in reversed(found)], fontsize=9, color=INK)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %", fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    width, n = rows[0]["fp32_accuracy"], rows[0]["n"]
    figure.text(0.03, 0.93, "Plain and split weights, one model trained on the spot", fontsize=12, color=INK)
    figure.text(0.03, 0.85, "plain", fontsize=9, color=PLAIN, fontweight="bold")
    figure.text(0.11, 0.85, "default split", fontsize=9, color=SPLIT, fontweight="bold")
    figure.text(0.30, 0.85, f"dashed: FP32, {100 * width:.1f} % (n = {n})", fontsize=9, color=INK)
    save_figure(path, figure)


def _label(row: Row) -> str:
    where = "" if row["backend"] == "simulated" else f", {row['backend']}"
    return f"{row['weights'].upper()}{where}\nper {row['granularity']}, {row['scheme']}"
