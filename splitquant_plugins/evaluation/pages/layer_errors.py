"""The error of every layer before and after a split, as a table with a bar for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitquant_plugins.evaluation.pages.html_page import legend, table
from splitquant_plugins.evaluation.tables import decibel, text

COLUMNS = (("layer", "layer", text), ("before", "before, dB", decibel), ("after", "after, dB", decibel))


def layer_errors(rows: Sequence[Mapping[str, Any]], names: tuple[str, str] = ("before", "after")) -> str:
    """Return the table of rows with `layer`, and `before` and `after` in decibels, None where one is not known."""
    known = [row[key] for row in rows for key in ("before", "after") if row[key] is not None]
    low, high = min([0.0, *known]), max([1.0, *known])
    drawn = [{**row, "bar": _bar(row["before"], row["after"], low, high)} for row in rows]
    labels = (COLUMNS[0], ("before", f"{names[0]}, dB", decibel), ("after", f"{names[1]}, dB", decibel))
    shown = (*labels, ("bar", "signal to noise", text))
    return legend([(names[0], 0, True), (names[1], 1, True)]) + table(drawn, shown, ready=("bar",), long=("layer",))


def _bar(before: float | None, after: float | None, low: float, high: float) -> str:
    """A line from the one to the other, with a mark at each."""

    def place(value: float) -> float:
        return 1 + 98 * (value - low) / (high - low)

    marks = []
    if before is not None and after is not None:
        left, right = sorted((place(before), place(after)))
        marks.append(f'<rect class="range" x="{left:.2f}" y="6" width="{max(right - left, 0.1):.2f}" height="2"/>')
    for value, name in ((before, "before"), (after, "after")):
        if value is not None:
            worse = name == "after" and before is not None and value < before
            kind = "worse" if worse else name
            marks.append(f'<rect class="{kind}" x="{place(value) - 0.7:.2f}" y="1" width="1.4" height="12"/>')
    return f'<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true">{"".join(marks)}</svg>'
