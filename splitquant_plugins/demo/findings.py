"""What the demo's figures say, in words; also where they say that a split is not worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def half_interval(accuracy: float, n: int) -> float:
    """Half the 95 % interval of an accuracy measured on n rows (normal approximation)."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)


def findings(rows: Sequence[Row]) -> list[str]:
    """One sentence per target, from its plain and its split row, and one on storage; the largest gain comes last.

    Rows are those of `compare`, one unsplit and one split for each target. A difference of less than the 95 %
    interval of FP32's accuracy is called noise.
    """
    noise = half_interval(rows[0]["fp32_accuracy"], rows[0]["n"])
    found = sorted(pairs(rows), key=lambda pair: pair[1]["accuracy"] - pair[0]["accuracy"])
    said = [_sentence(target_of(plain), plain, split, noise) for plain, split in found]
    storage = _storage(found)
    return [*storage, *said]


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The plain and the split row of every target, in the order of the rows."""
    found: dict[str, dict[bool, Row]] = {}
    for row in rows:
        found.setdefault(target_of(row), {})[row["split"] == "none"] = row
    return [(of_target[True], of_target[False]) for of_target in found.values()]


def target_of(row: Row) -> str:
    """What a row's weights were rounded to, as `INT2 per tensor, symmetric (simulated)`."""
    return f"{row['weights'].upper()} per {row['granularity']}, {row['scheme']} ({row['backend']})"


def _storage(found: Sequence[tuple[Row, Row]]) -> list[str]:
    split = [split for _, split in found if (split["backend"], split["weights"]) == ("quanto", "int2")]
    plain = [plain for plain, _ in found if (plain["backend"], plain["weights"]) == ("quanto", "int4")]
    if not split or not plain:
        return []
    return [
        f"Storage: the split at INT2 keeps {split[0]['linear_bits_per_weight']:.2f} bits per weight for "
        f"{100 * split[0]['accuracy']:.1f} %, plain INT4 {plain[0]['linear_bits_per_weight']:.2f} for "
        f"{100 * plain[0]['accuracy']:.1f} %: a split is for targets that do not have the wider integers."
    ]


def _sentence(target: str, plain: Row, split: Row, noise: float) -> str:
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
        f"{target}: plain {_points(plain_change)}, split {_points(split_change)} points against FP32 (noise "
        f"±{100 * noise:.1f}): {verdict}. Weight SQNR {plain['weight_sqnr_db']:.1f} dB plain, "
        f"{split['weight_sqnr_db']:.1f} dB split."
    )


def _points(change: float) -> str:
    return f"{100 * change + 0.0:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
