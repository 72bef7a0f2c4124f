"""The backend matrix on the real BERT-Tiny: every figure against the reference file, plain and split.

reference.json holds, for each row, the measured value with its tolerance, the seed, the number of layers and
the versions that it was measured with; `python integration/record.py` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.evaluation.compare import plan_runs, row_of
from splitquant_plugins.evaluation.subject import Subject
from splitquant_plugins.plugins import Plugins

REFERENCE = json.loads(Path(__file__).with_name("reference.json").read_text("utf-8"))
ROWS = REFERENCE["rows"]


# Accuracy and weight SQNR (dB) that splits by `grid` into INT2 parts keep on emotion at least: by granularity,
# scheme, parts, and budget in stored bits per weight.
GRID_FLOORS = {
    ("tensor", "affine", 3, None): (0.885, 16),
    ("channel", "affine", 3, None): (0.885, 25),
    ("tensor", "symmetric", 3, None): (0.875, 11.5),
    ("channel", "symmetric", 3, None): (0.885, 16.5),
    ("tensor", "affine", 2, None): (0.88, 10),
    ("tensor", "affine", None, 4.0): (0.883, 10),
}


def name_of(row: dict) -> str:
    options = "".join(f"-{key}{value:g}" for key, value in row["options"].items())
    return "-".join(str(row[key]) for key in ("backend", "weights", "task", "granularity", "scheme", "split")) + options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cell = metafunc.config.getoption("--cell")
    rows = [row for row in ROWS if not cell or f"{row['backend']}-{row['weights']}" == cell]
    assert rows, f"reference.json has no row for {cell}"
    metafunc.parametrize(
        ("row", "task"), [(row, row["task"]) for row in rows], ids=[name_of(row) for row in rows], scope="session"
    )


def test_row_is_as_recorded(row: dict, subject: Subject) -> None:
    request = WeightRequest(row["weights"], row["granularity"], row["group_size"], row["scheme"])
    (run,) = plan_runs(Plugins.load(), [row["backend"]], [request], [row["split"]], [row["seed"]], row["options"])
    measured = row_of(subject, run)
    tolerance = REFERENCE["tolerance"]
    assert measured["n"] == row["n"]
    assert measured["layers_split"] == row["layers_split"]
    assert measured["layers_quantized"] == row["layers_quantized"]
    assert measured["linear_bytes"] == row["linear_bytes"]
    for figure in ("accuracy", "fp32_accuracy", "weight_sqnr_db", "logit_sqnr_db"):
        assert measured[figure] == pytest.approx(row[figure], abs=tolerance[figure]), figure


def test_the_reference_keeps_the_promises(row: dict, task: str) -> None:
    """What the README promises must be true of the figures themselves, whoever records them anew."""
    promises = {("emotion", "int2"): 0.883, ("sms", "int2"): 0.996}
    if row["split"] == "kmeans" and row["default_grid"]:
        floor = promises.get((task, row["weights"]), row["fp32_accuracy"] - 0.005)
        assert row["accuracy"] >= floor
    if row["split"] == "grid":
        budget = row["options"].get("budget")
        accuracy, sqnr = GRID_FLOORS[row["granularity"], row["scheme"], row["k"], budget]
        assert row["accuracy"] >= accuracy
        assert row["weight_sqnr_db"] >= sqnr
        # PT2E keeps a code of 2 bits in a byte.
        assert budget is None or row["linear_bits_per_weight"] <= 4 * budget
    if row["split"] == "none" and task == "emotion" and row["weights"] == "int2":
        assert row["accuracy"] < 0.80
