"""`splitquant compare`: choices of values, calibration, and rows of equal storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitquant_plugins.cli.main import run


@pytest.fixture
def rows_of(classifier: Callable[..., Path], texts: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    folder = classifier()

    def rows(*arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "rows.json"
        common = ["compare", str(folder), "--data", str(texts), "--backend", "simulated", "--weights", "int2"]
        assert run([*common, *arguments, "--json", str(path)]) == 0
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found

    return rows


def test_values_that_are_calibrated(rows_of: Callable[..., list[dict[str, Any]]], texts: Path) -> None:
    rows = rows_of("--method", "rtn,decoupleq", "--calibration", str(texts), "--split", "none,kmeans", "--k", "2")
    assert [(row["method"], row["split"], row["layers_solved"]) for row in rows] == [
        ("rtn", "none", 0),
        ("rtn", "kmeans", 0),
        ("decoupleq", "none", 8),
        ("decoupleq", "kmeans", 8),
    ]
    for plain, solved in zip(rows[:2], rows[2:], strict=True):
        assert solved["linear_bits_per_weight"] == plain["linear_bits_per_weight"]
        assert solved["logit_sqnr_db"] > plain["logit_sqnr_db"]


def test_the_old_names_of_method_go_on_working(
    rows_of: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of("--values", "rtn", "--split", "none", "--limit", "4")
    assert row["values"] == row["method"] == "rtn"
    assert "warning: --values is called --method now" in capsys.readouterr().err
    (row,) = rows_of("--method", "rtn", "--split", "none", "--limit", "4")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "method"), [("simulated", "decoupleq"), ("inc", "gptq")])
def test_methods_without_their_data_name_the_option(
    backend: str, method: str, classifier: Callable[..., Path], texts: Path, fails: Callable[..., str]
) -> None:
    if backend == "inc":
        pytest.importorskip("neural_compressor")
    line = fails("compare", classifier(), "--data", texts, "--backend", backend, "--method", method)
    assert "--calibration FILE" in line
    assert repr(method) in line


@pytest.mark.parametrize(
    ("options", "bits"),
    [(["--k", "2"], 4), (["--k", "5"], 8), (["--split", "grid", "--budget", "5.5"], 5)],
)
def test_equal_storage_adds_plain_rows(
    options: list[str], bits: int, rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = rows_of("--equal-storage", *options)
    assert (rows[-1]["backend"], rows[-1]["weights"], rows[-1]["split"]) == ("simulated", f"int{bits}", "none")
    assert sum(row["weights"] != "int2" for row in rows) == 1
