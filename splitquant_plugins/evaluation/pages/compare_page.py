"""The page of a comparison: trade-off, table, the error of every layer, and what was left whole and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitquant_plugins.checkpoints.coverage import coverage_of, sentences
from splitquant_plugins.evaluation.choices import WHOLE
from splitquant_plugins.evaluation.pages.html_page import details, heading, legend, page, paragraph, table
from splitquant_plugins.evaluation.pages.layer_errors import layer_errors
from splitquant_plugins.evaluation.pages.trade_off import Point, Quality, draw_trade_off, pareto_front
from splitquant_plugins.evaluation.tables import Column, percent, text, whole
from splitquant_plugins.evaluation.tasks.language_model import head_sentences

UNSPLIT = "none"
DIVERGENCE = Quality(
    "KL to the float model, nats per token", less_is_better=True, logarithmic=True, show="{:.3g}".format
)
_SHARES = {"accuracy": "accuracy", "agreement": "agreement with the float model"}
# What makes a row with a split and one without comparable.
_SAME = ("backend", "quantizer", "weights", "granularity", "group_size", "scheme", "method")


def compare_page(title: str, subtitle: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return the page of the rows of a comparison, with those columns in its table."""
    measure, quality = _quality(rows)
    splits = list(dict.fromkeys([UNSPLIT, *(row["split"] for row in rows)]))
    points = [_point(number, row, measure, splits) for number, row in enumerate(rows)]
    front = pareto_front(points, quality)
    least = 1.0 if measure == "agreement" else rows[0]["fp32_accuracy"] if measure == "accuracy" else None
    numbered = [{**row, "number": number + 1} for number, row in enumerate(rows)]
    entries = [
        (f"split {name}" if name != UNSPLIT else "plain", splits.index(name), name != UNSPLIT) for name in splits
    ]
    sections = [
        heading("Quality against stored bits"),
        paragraph(
            f"{quality.name[0].upper()}{quality.name[1:]}; numbers are rows of the table. The line is the Pareto "
            "front: nothing is both smaller and better than what lies on it.",
            faint=True,
        ),
        draw_trade_off(points, quality, least),
        legend([entry for entry in entries if entry[0] != "plain" or any(row["split"] == UNSPLIT for row in rows)]),
        heading("All rows"),
        paragraph("Rows on the front are bold.", faint=True),
        table(numbered, (("number", "", whole), *columns), best=front),
        *_layers(rows, front),
        *_left(rows),
    ]
    return page(title, subtitle, sections)


def _quality(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Quality]:
    if rows[0]["kl"] is not None:
        return "kl", DIVERGENCE
    measure = next((name for name in _SHARES if rows[0][name] is not None), None)
    if measure is None:
        name = "signal-to-noise ratio of the outputs, dB"
        return "logit_sqnr_db", Quality(name, less_is_better=False, logarithmic=False, show="{:.4g}".format)
    return measure, Quality(_SHARES[measure], less_is_better=False, logarithmic=False, show=_percent)


def _percent(value: float) -> str:
    return percent(value).replace(".00", "")


def _point(number: int, row: Mapping[str, Any], measure: str, splits: Sequence[str]) -> Point:
    colour = splits.index(row["split"])
    return Point(
        row["linear_disk_bits_per_weight"], row[measure], str(number + 1), _name(row), colour, row["split"] != UNSPLIT
    )


def _name(row: Mapping[str, Any]) -> str:
    parts = [row["backend"], row["quantizer"] or row["weights"], row["granularity"], row["scheme"], row["method"]]
    split = "plain" if row["split"] == UNSPLIT else f"split {row['split']}, k = {row['k'] or 'by budget'}"
    return f"{' '.join(map(str, parts))}, {split}, seed {row['seed']}"


def _layers(rows: Sequence[Mapping[str, Any]], front: Sequence[int]) -> list[str]:
    """The errors of every layer, of each row that is split beside the one that is not."""
    found: list[str] = []
    opened = False
    for number, row in enumerate(rows):
        if row["split"] == UNSPLIT:
            continue
        plain = next((r for r in rows if r["split"] == UNSPLIT and all(r[key] == row[key] for key in _SAME)), None)
        before = {each["layer"]: each["weight_sqnr_db"] for each in plain["layers"]} if plain is not None else {}
        lines = [
            {"layer": each["layer"], "before": before.get(each["layer"]), "after": each["weight_sqnr_db"]}
            for each in row["layers"]
        ]
        shown = number in front and not opened
        opened = opened or shown
        found.append(details(f"{number + 1}: {_name(row)}", layer_errors(lines, ("plain", "split")), shown=shown))
    if not found:
        return []
    return [heading("Error of every layer"), paragraph("More decibels are a smaller error.", faint=True), *found]


def _left(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was left whole or float, and why."""
    found = [heading("Left whole or float, and why")]
    for number, row in enumerate(rows):
        lines = [{"layer": each["layer"], "why": each["why"]} for each in row["choices"] if each["chosen"] == WHOLE]
        content = "".join(paragraph(line) for line in (*sentences(coverage_of(row)), *head_sentences(row)))
        if lines:
            columns = (("layer", "stays whole", text), ("why", "why", text))
            content += table(lines, columns, long=("layer", "why"))
        found.append(details(f"{number + 1}: {_name(row)}", content, shown=number == len(rows) - 1))
    return found
