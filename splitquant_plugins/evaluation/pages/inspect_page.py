"""The page of an inspection: what a split would bring each layer, what it costs, and what would stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitquant_plugins.evaluation.pages.html_page import details, heading, legend, page, paragraph, table
from splitquant_plugins.evaluation.pages.layer_errors import layer_errors
from splitquant_plugins.evaluation.pages.trade_off import Point, Quality, draw_trade_off
from splitquant_plugins.evaluation.tables import Column, text

DECIBELS = Quality(
    "signal-to-noise ratio of the weight, dB", less_is_better=False, logarithmic=False, show="{:.4g}".format
)
_GRIDS = {"channel": "per output channel", "tensor": "per tensor"}


def inspect_page(
    title: str,
    subtitle: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    kept: Mapping[str, str],
    curve: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page of the rows of an inspection.

    `kept` says of layers that stay float why they do, `curve` are the steps of the best trade-off under budgets.
    """
    sections = [heading("Error of every layer, whole and split")]
    sections.append(paragraph("Affine grids of that many bits. More decibels are a smaller error.", faint=True))
    for number, (grid, said) in enumerate(_GRIDS.items()):
        lines = [{"layer": r["layer"], "before": r[f"{grid}_plain_db"], "after": r[f"{grid}_split_db"]} for r in rows]
        sections.append(details(f"One scale {said}", layer_errors(lines, ("whole", "split")), shown=number == 0))
    sections += [heading("Error against stored bits"), *_trade_off(rows, curve)]
    sections += [heading("All layers"), table(rows, columns, long=("layer",))]
    left = [{"layer": row["layer"], "why": row["reason"]} for row in rows if row["reason"]]
    left += [{"layer": name, "why": why} for name, why in kept.items()]
    if left:
        sections.append(heading("Left whole or float, and why"))
        sections.append(table(left, (("layer", "layer", text), ("why", "why", text)), long=("layer", "why")))
    return page(title, subtitle, sections)


def _trade_off(rows: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """The curve of budgets where it is known, or else every layer whole and split."""
    if curve:
        points = [
            Point(step["bits_per_weight"], step["weight_sqnr_db"], "", f"{step['layer']} in {step['k']}", 1)
            for step in curve
        ]
        words = "All layers together; each point gives one more layer more parts, the one that gains most."
        return [paragraph(words, faint=True), draw_trade_off(points, DECIBELS)]
    points = []
    for number, row in enumerate(rows):
        for kind, colour in (("plain", 0), ("split", 1)):
            bits, quality = row[f"channel_{kind}_bits_per_weight"], row[f"channel_{kind}_db"]
            label = str(number + 1) if len(rows) <= 12 else ""
            points.append(Point(bits, quality, label, f"{row['layer']}, {kind}", colour, kind == "split"))
    words = (
        "A layer, whole and split, per output channel. With --curve: what each budget of bits leaves over all layers."
    )
    return [
        paragraph(words, faint=True),
        draw_trade_off(points, DECIBELS, front=False),
        legend([("whole", 0, False), ("split", 1, True)]),
    ]
