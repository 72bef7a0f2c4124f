"""Thresholds that make a comparison a gate: what a row must not fall below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitquant_plugins.errors import ConfigError

# Measures by the name in rows, with what one unit of the threshold is: per cent as the table has them, or dB.
UNITS = {"accuracy": 100.0, "agreement": 100.0, "logit_sqnr_db": 1.0, "weight_sqnr_db": 1.0}


@dataclass(frozen=True)
class Threshold:
    """The least value of a measure: per cent for accuracy and agreement, dB for the others."""

    measure: str
    least: float

    def failure(self, row: Mapping[str, Any]) -> str | None:
        """Say what is below; None where nothing is. A measure that is no number is below."""
        value = UNITS[self.measure] * row[self.measure]
        if value >= self.least:
            return None
        unit = "%" if UNITS[self.measure] == 100.0 else "dB"
        which = f"{row['backend']} {row['weights']} split {row['split']}, seed {row['seed']}"
        return f"{which}: {self.measure} {value:.2f} {unit} is below {self.least:g} {unit}"


def parse_thresholds(given: Sequence[str]) -> list[Threshold]:
    """Read MEASURE=VALUE; ConfigError for other measures, values that are no number, and a measure given twice."""
    found: dict[str, Threshold] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in UNITS:
            raise ConfigError(f"--fail-below {text}: write MEASURE=VALUE, with one of {', '.join(UNITS)}")
        try:
            least = float(value)
        except ValueError:
            least = math.nan
        if not math.isfinite(least):
            raise ConfigError(f"--fail-below {text}: {value!r} is no number")
        if name in found:
            raise ConfigError(f"--fail-below {name} is given twice")
        found[name] = Threshold(name, least)
    return list(found.values())


def failures(thresholds: Sequence[Threshold], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which rows are below a threshold.

    Judged are the rows with a split, of every backend, width and seed; plain rows, which are there to be compared
    with, only where no row has a split.
    """
    judged = [row for row in rows if row["split"] != "none"] or rows
    said = (threshold.failure(row) for row in judged for threshold in thresholds)
    return [line for line in said if line is not None]
