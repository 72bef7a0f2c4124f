"""What the demo's figures say, in words; also where they say that a split is not worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def half_interval(accuracy: float, n: int) -> float:
    """Half the 95 % interval of an accuracy measured on n rows (normal approximation)."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per width, from its plain and its split row, and one on storage.

    Rows are those of `compare`, one unsplit and one split for each width. A difference of less than the 95 %
    interval of FP32's accuracy is called noise.
    """
    noise = half_interval(rows[0]["fp32_accuracy"], rows[0]["n"])
    pairs = {width: _pair(rows, width) for width in dict.fromkeys(row["weights"] for row in rows)}
    said = [_sentence(width.upper(), plain, split, noise) for width, (plain, split) in pairs.items()]
    if "int2" in pairs and "int4" in pairs:
        split, plain = pairs["int2"][1], pairs["int4"][0]
        said.append(
            f"Storage: the split at INT2 keeps {split['linear_bits_per_weight']:.2f} bits per weight for "
            f"{100 * split['accuracy']:.1f} %, plain INT4 {plain['linear_bits_per_weight']:.2f} for "
            f"{100 * plain['accuracy']:.1f} %: a split is for targets that do not have the wider integers."
        )
    return said


def _pair(rows: Sequence[Mapping[str, Any]], width: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    here = [row for row in rows if row["weights"] == width]
    return next(row for row in here if row["split"] == "none"), next(row for row in here if row["split"] != "none")


def _sentence(width: str, plain: Mapping[str, Any], split: Mapping[str, Any], noise: float) -> str:
    fp32 = plain["fp32_accuracy"]
    plain_change, split_change = plain["accuracy"] - fp32, split["accuracy"] - fp32
    if plain_change >= -noise and split_change >= -noise:
        verdict = "both are within the noise of FP32, so there is no accuracy for a split to win back here"
    elif plain_change >= -noise:
        verdict = "plain rounding is within the noise of FP32, and the split does harm here"
    elif split_change - plain_change > noise:
        verdict = "the split wins back " + ("all of it but noise" if split_change >= -noise else "part of it")
    else:
        verdict = "the split does not help here"
    return (
        f"{width}: plain {_points(plain_change)}, split {_points(split_change)} points against FP32 (noise "
        f"±{100 * noise:.1f}): {verdict}. Weight SQNR {plain['weight_sqnr_db']:.1f} dB plain, "
        f"{split['weight_sqnr_db']:.1f} dB split."
    )


def _points(change: float) -> str:
    return f"{100 * change + 0.0:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
