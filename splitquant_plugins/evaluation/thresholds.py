"""Thresholds that make a comparison a gate: what a row must not fall below, or rise above."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitquant_plugins.errors import ConfigError

# Measures by the name in rows, with what one unit of the threshold is: per cent as the table has them, or dB.
UNITS = {"accuracy": 100.0, "agreement": 100.0, "logit_sqnr_db": 1.0, "weight_sqnr_db": 1.0}
# Measures of which less is better, in units of their own.
LESS_IS_BETTER = ("perplexity", "kl")
OF_WEIGHTS = "weight_sqnr_db"


@dataclass(frozen=True)
class Threshold:
    """The least value of a measure, per cent for accuracy and agreement and dB for the others, or with `most` the most.

    Where there is a most, it is of perplexity or of the divergence in nats per token.
    """

    measure: str
    bound: float
    most: bool = False

    def failure(self, row: Mapping[str, Any]) -> str | None:
        """Say what is beyond; None where nothing is. A measure that is no number is beyond."""
        measured = row[self.measure]
        value = UNITS.get(self.measure, 1.0) * (math.nan if measured is None else measured)
        if value <= self.bound if self.most else value >= self.bound:
            return None
        unit = "" if self.most else " %" if UNITS[self.measure] == 100.0 else " dB"
        which = f"{row['backend']} {row['weights']} split {row['split']}, seed {row['seed']}"
        side = "above" if self.most else "below"
        digits = ".4g" if self.most else ".2f"
        return f"{which}: {self.measure} {value:{digits}}{unit} is {side} {self.bound:g}{unit}"


def parse_thresholds(below: Sequence[str], above: Sequence[str] = ()) -> list[Threshold]:
    """Read MEASURE=VALUE; ConfigError for other measures, values that are no number, and a measure given twice."""
    found: dict[str, Threshold] = {}
    for text, most in [*((text, False) for text in below), *((text, True) for text in above)]:
        option = "--fail-above" if most else "--fail-below"
        known = LESS_IS_BETTER if most else tuple(UNITS)
        name, equals, value = (part.strip() for part in text.partition("="))
        if not most and equals and name in LESS_IS_BETTER:
            raise ConfigError(f"--fail-below {text}: less {name} is better; write --fail-above {text}")
        if not equals or name not in known:
            raise ConfigError(f"{option} {text}: write MEASURE=VALUE, with one of {', '.join(known)}")
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise ConfigError(f"{option} {text}: {value!r} is no number")
        if name in found:
            raise ConfigError(f"{option} {name} is given twice")
        found[name] = Threshold(name, bound, most)
    return list(found.values())


def refuse_unmeasured(thresholds: Sequence[Threshold], kind: str, measures: Sequence[str]) -> None:
    """Raise ConfigError for a threshold of what a model of this kind is not measured by."""
    for each in thresholds:
        if each.measure != OF_WEIGHTS and each.measure not in measures:
            known = ", ".join(name for name in (*measures, OF_WEIGHTS) if name in (*UNITS, *LESS_IS_BETTER))
            raise ConfigError(f"a {kind} has no {each.measure} to fail by; choose from {known}")


def failures(thresholds: Sequence[Threshold], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which rows are beyond a threshold.

    Judged are the rows with a split, of every backend, width and seed. Plain rows are there to be compared with: where
    no row has a split, those are judged whose values decoupleQ chose, and where there are none, all.
    """
    split = [row for row in rows if row["split"] != "none"]
    judged = split or [row for row in rows if row["values"] == "decoupleq"] or rows
    said = (threshold.failure(row) for row in judged for threshold in thresholds)
    return [line for line in said if line is not None]
