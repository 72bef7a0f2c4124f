"""Draw the pictures of the documents: idea.svg, from synthetic weights, and flow.svg.

python docs/make_pictures.py
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from splitquant_plugins import LayerPlan, SplitQuantPass, UniformGrid
from splitquant_plugins.evaluation.metrics import sqnr_db
from splitquant_plugins.evaluation.pictures import COLOURS, FAINT, INK, WHOLE

HERE = Path(__file__).parent
GRID = UniformGrid(bits=2, granularity="tensor")
BINS = 126
RANGE = (-1.44, 1.08)  # room for the level that lies beyond the weights
COUNTS = (0.7, 4000)
LEFT, RIGHT = 168, 638  # where the axes of the idea begin and end, in pixels
NAMES = ("=  lower", "+  middle", "+  upper")

# Each step of the flow: what it does, its hooks (without `splitquant_`), and the room that it is in.
STEPS = {
    "prepare": (("fold BatchNorm,", "untie weights"), ("prepare_model",), "passes/"),
    "select": (("which layers,", "and why not"), ("select_layer",), "passes/"),
    "split": (("one tensor", "into k parts"), ("split_tensor",), "splitters/"),
    "build": (("a module that", "sums its parts"), ("build_module",), "builtin/"),
    "check": (("the same function,", "or put back"), (), "passes/"),
    "record": (("what, how,", "at what cost"), ("after_layer", "after_split"), "passes/"),
}


class Drawing:
    """The elements of an SVG, a line of text each; coordinates in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        fonts = "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif"
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{fonts}" font-size="12">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def path(self, steps: str, *, fill: str = "none", stroke: str = "none", width: float = 1) -> None:
        """A path in SVG's own language of steps."""
        self.lines.append(f'<path d="{steps}" fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> None:
        """A rectangle with round corners."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'<rect {place} rx="6" fill="{fill}" stroke="{stroke}"/>')

    def arrow(self, x: float, y: float, end_x: float, end_y: float) -> None:
        """A straight arrow, to the right or downwards."""
        self.path(f"M{x:g} {y:g}L{end_x:g} {end_y:g}", stroke=INK, width=1.2)
        head = "l-6 -4v8z" if end_x > x else "l-4 -6h8z"
        self.path(f"M{end_x:g} {end_y:g}{head}", fill=INK)

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, bold: bool = False, anchor: str = "start"
    ) -> None:
        """One line of text, with its baseline at y."""
        weight, colour = (' font-weight="bold"', INK) if bold else ("", FAINT)
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}"'
        self.lines.append(f'<text {place}{weight} fill="{colour}">{escape(text)}</text>')

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self.lines, "</svg>", ""])


def synthetic_weights() -> Tensor:
    """A bell with a few large values on both sides, as weights of trained layers often look; [20000]."""
    random = torch.Generator().manual_seed(0)
    bell = 0.12 * torch.randn(19_900, generator=random)
    outliers = (0.55 + 0.45 * torch.rand(100, generator=random)) * torch.randn(100, generator=random).sign()
    return torch.cat([bell, outliers])


def levels(values: Tensor) -> list[float]:
    """The four values that the grid of these values can hold."""
    _, scale, zero_point = GRID.quantize(values[None])
    low, high = GRID.quant_min, GRID.quant_max
    return [float(level) for level in ((torch.arange(low, high + 1) - zero_point) * scale).flatten()]


def idea() -> str:
    """One row for the weight as it is, and one for each of its parts, all on the same axis."""
    weights = synthetic_weights()
    plan = LayerPlan("linear", weights[None], None)
    parts = [part.flatten() for part in SplitQuantPass(k=3).split_tensors("layer", plan).weight]
    split = torch.stack([GRID.quantize_dequantize(part) for part in parts]).sum(0)
    plain_db, split_db = sqnr_db(weights, GRID.quantize_dequantize(weights)), sqnr_db(weights, split)

    drawing = Drawing(840, 538, "A layer's weights, and its three parts, each on the four levels of INT2")
    heading = "INT2 has four levels. Split in three parts that add up to the layer, each spends four on its own range."
    drawing.text(420, 24, heading, size=13, bold=True, anchor="middle")
    floor = 184
    for part, colour in zip(parts, COLOURS, strict=False):
        _bars(drawing, part[part != 0], floor, 130, colour)
    _axis(drawing, levels(weights), floor, 130)
    _label(drawing, floor - 81, "one layer", ("its weights, with", "a few large values"))
    remarks = (f"{_apart(levels(weights))}:", "most weights become 0", f"SQNR {plain_db:.1f} dB")
    for number, remark in enumerate(remarks):
        drawing.text(RIGHT + 14, floor - 92 + 15 * number, remark)
    for part, name, colour in zip(parts, NAMES, COLOURS, strict=False):
        floor += 102
        _bars(drawing, weights, floor, 76, WHOLE)
        _bars(drawing, part[part != 0], floor, 76, colour)
        _axis(drawing, levels(part), floor, 76)
        _label(drawing, floor - 48, name, ("0 elsewhere",))
        drawing.text(RIGHT + 14, floor - 44, _apart(levels(part)))
    drawing.text(RIGHT + 14, floor - 16, f"together: SQNR {split_db:.1f} dB", bold=True)
    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0):
        drawing.path(f"M{_across(tick):.1f} {floor}v3", stroke=FAINT)
        drawing.text(_across(tick), floor + 16, f"{tick:.1f}".replace("-", "\N{MINUS SIGN}"), size=11, anchor="middle")
    drawing.text((LEFT + RIGHT) / 2, floor + 34, "weight value (counts on a logarithmic scale)", anchor="middle")
    return drawing.svg()


def _across(value: float) -> float:
    return LEFT + (RIGHT - LEFT) * (value - RANGE[0]) / (RANGE[1] - RANGE[0])


def _apart(values: list[float]) -> str:
    return f"4 levels, {values[1] - values[0]:.2f} apart"


def _bars(drawing: Drawing, values: Tensor, floor: int, height: int, colour: str) -> None:
    """A histogram as one path: up or down to each count, and across to the next edge."""
    counts = torch.histogram(values, torch.linspace(*RANGE, BINS + 1)).hist.tolist()
    low, high = (math.log(count) for count in COUNTS)
    tops = [floor - height * max(0, math.log(count) - low) / (high - low) if count else floor for count in counts]
    steps, at = f"M{LEFT} {floor}", float(floor)
    for number, top in enumerate(tops):
        if round(top, 1) != round(at, 1):
            steps += f"H{LEFT + (RIGHT - LEFT) * number / BINS:.1f}V{top:.1f}"
            at = top
    drawing.path(f"{steps}H{RIGHT}V{floor}z", fill=colour)


def _axis(drawing: Drawing, values: list[float], floor: int, height: int) -> None:
    drawing.path(f"M{LEFT} {floor}H{RIGHT}", stroke=FAINT)
    drawing.path("".join(f"M{_across(value):.1f} {floor}v{-height}" for value in values), stroke=INK, width=2)


def _label(drawing: Drawing, y: int, name: str, detail: tuple[str, ...]) -> None:
    drawing.text(LEFT - 20, y, name, size=14.5, bold=True, anchor="end")
    for number, line in enumerate(detail):
        drawing.text(LEFT - 20, y + 18 + 15 * number, line, anchor="end")


def flow() -> str:
    """The steps from a float model to a split one, and where a backend's adapter comes in."""
    drawing = Drawing(880, 330, "The flow: prepare, select, split, build, check, record")
    width, gap, top = 114, 20, 128
    left = (880 - 6 * width - 5 * gap) / 2
    middle = left + 2 * (width + gap) + width / 2

    drawing.box(left, 20, 6 * width + 5 * gap, 52, "#f4f4f4", FAINT)
    drawing.text(left + 14, 42, "adapter of a backend", size=13, bold=True)
    drawing.text(left + 14, 60, "SplitQuantPass() + recipe")
    drawing.text(left + 6 * width + 5 * gap - 14, 51, "quantizes the split model as its recipe says", anchor="end")
    drawing.arrow(left + width / 2, 72, left + width / 2, top - 2)
    drawing.text(left + width / 2 + 8, 98, "float model")
    drawing.arrow(middle, 72, middle, top - 2)
    drawing.text(middle + 8, 98, "grid: how the backend rounds")
    last = left + 5 * (width + gap) + width / 2
    drawing.path(f"M{last:g} {top}V80", stroke=INK, width=1.2)
    drawing.path(f"M{last:g} 74l-4 6h8z", fill=INK)
    drawing.text(last - 8, 98, "split model", anchor="end")
    drawing.text(last - 8, 114, "and its manifest", anchor="end")

    for number, (name, (lines, hooks, room)) in enumerate(STEPS.items()):
        x = left + number * (width + gap)
        drawing.box(x, top, width, 92, "#cfe5f3" if name != "split" else "#fbe3b5")
        drawing.text(x + width / 2, top + 26, name, size=15, bold=True, anchor="middle")
        for row, line in enumerate(lines):
            drawing.text(x + width / 2, top + 50 + 15 * row, line, size=10.5, anchor="middle")
        drawing.text(x + width / 2, top + 112, room, size=12, bold=True, anchor="middle")
        for row, hook in enumerate(hooks):
            drawing.text(x + width / 2, top + 130 + 15 * row, hook, size=11, anchor="middle")
        if number:
            drawing.arrow(x - gap, top + 46, x - 1, top + 46)
    drawing.text(left, 312, "Below each step: its room, and its hooks without their prefix splitquant_.", size=11)
    drawing.text(left, 326, "Yellow: tensors in, tensors out, and no module in sight. Blue: modules.", size=11)
    return drawing.svg()


def main(folder: Path = HERE) -> None:
    """Write the pictures; the same weights give the same bytes."""
    for name, svg in {"idea.svg": idea(), "flow.svg": flow()}.items():
        (folder / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
