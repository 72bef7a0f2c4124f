"""Draw docs/idea.svg, the picture of the idea in the README, from synthetic weights.

python docs/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from splitquant_plugins import LayerPlan, SplitQuantPass, UniformGrid
from splitquant_plugins.evaluation.metrics import sqnr_db
from splitquant_plugins.evaluation.pictures import COLOURS, FAINT, INK, WHOLE

GRID = UniformGrid(bits=2, granularity="tensor")
BINS = 126
RANGE = (-1.44, 1.08)  # room for the level that lies beyond the weights
NAMES = ("=  lower", "+  middle", "+  upper")


def synthetic_weights() -> Tensor:
    """A bell with a few large values on both sides, as weights of trained layers often look; [20000]."""
    random = torch.Generator().manual_seed(0)
    bell = 0.12 * torch.randn(19_900, generator=random)
    outliers = (0.55 + 0.45 * torch.rand(100, generator=random)) * torch.randn(100, generator=random).sign()
    return torch.cat([bell, outliers])


def levels(values: Tensor) -> Tensor:
    """The four values that the grid of these values can hold."""
    _, scale, zero_point = GRID.quantize(values[None])
    low, high = GRID.quant_min, GRID.quant_max
    return ((torch.arange(low, high + 1) - zero_point) * scale).flatten()


def draw() -> Figure:
    """One row for the weight as it is, and one for each of its parts, all on the same axis."""
    weights = synthetic_weights()
    plan = LayerPlan("linear", weights[None], None)
    parts = [part.flatten() for part in SplitQuantPass(k=3).split_tensors("layer", plan).weight]
    split = torch.stack([GRID.quantize_dequantize(part) for part in parts]).sum(0)
    plain_db, split_db = sqnr_db(weights, GRID.quantize_dequantize(weights)), sqnr_db(weights, split)

    figure = Figure(figsize=(8.4, 5.6), facecolor="white")
    FigureCanvasAgg(figure)
    top, *below = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [1.7, 1, 1, 1]})
    figure.subplots_adjust(left=0.2, right=0.76, top=0.9, bottom=0.09, hspace=0.28)
    edges = torch.linspace(*RANGE, BINS + 1)

    for part, colour in zip(parts, COLOURS, strict=False):
        _bars(top, part[part != 0], edges, colour)
    _levels(top, levels(weights))
    _label(
        top,
        "one layer",
        "its weights, with\na few large values",
        f"{_apart(levels(weights))}:\nmost weights become 0\nSQNR {plain_db:.1f} dB",
    )
    for axes, part, name, colour in zip(below, parts, NAMES, COLOURS, strict=False):
        _bars(axes, weights, edges, WHOLE)
        _bars(axes, part[part != 0], edges, colour)
        _levels(axes, levels(part))
        _label(axes, name, "0 elsewhere", _apart(levels(part)))
    below[-1].text(1.03, 0.2, f"together: SQNR {split_db:.1f} dB", transform=below[-1].transAxes, **_style(True))
    below[-1].set_xlabel("weight value (counts on a logarithmic scale)", fontsize=9, color=FAINT)
    figure.text(
        0.02,
        0.955,
        "INT2 has four levels. Split in three parts that add up to the layer, each part spends four on its own range.",
        **_style(True, 10),
    )
    return figure


def _apart(values: Tensor) -> str:
    return f"4 levels, {float(values[1] - values[0]):.2f} apart"


def _bars(axes: Any, values: Tensor, edges: Tensor, colour: str) -> None:
    axes.stairs(torch.histogram(values, edges).hist.numpy(), edges.numpy(), fill=True, color=colour)


def _levels(axes: Any, values: Tensor) -> None:
    for value in values.tolist():
        axes.axvline(value, color=INK, linewidth=1.6)


def _label(axes: Any, name: str, detail: str, grid: str) -> None:
    axes.set_yscale("log")
    axes.set_ylim(0.7, 4000)
    axes.set_xlim(*RANGE)
    axes.set_yticks([])
    axes.minorticks_off()
    axes.tick_params(labelsize=8, length=2, color=FAINT, labelcolor=FAINT)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.text(-0.04, 0.62, name, transform=axes.transAxes, ha="right", **_style(True, 11))
    axes.text(-0.04, 0.52, detail, transform=axes.transAxes, ha="right", va="top", **_style())
    axes.text(1.03, 0.62, grid, transform=axes.transAxes, va="center", **_style())


def _style(bold: bool = False, size: float = 9) -> dict[str, Any]:
    return {"fontsize": size, "color": INK if bold else FAINT, "fontweight": "bold" if bold else "normal"}


def main() -> None:
    """Write the picture beside this file; the same weights give the same bytes."""
    path = Path(__file__).with_name("idea.svg")
    with matplotlib.rc_context({"svg.hashsalt": "splitquant"}):
        draw().savefig(path, metadata={"Date": None, "Creator": None})
    print(path)


if __name__ == "__main__":
    main()
