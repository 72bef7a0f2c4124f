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


def test_what_the_default_chose_is_told_layer_by_layer(
    rows_of: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, split = rows_of("--split", "none,auto", "--k", "2", "--limit", "4", "--granularity", "tensor")
    assert plain["choices"] == []
    assert len(split["choices"]) == split["layers_split"]
    assert {each["chosen"] for each in split["choices"]} == {"grid"}
    assert all(each["k"] == 2 and "is known" in each["why"] for each in split["choices"])
    assert f"simulated int2 auto: grid {split['layers_split']}\n" in capsys.readouterr().out


def test_the_old_names_of_method_go_on_working(
    rows_of: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of("--values", "rtn", "--split", "none", "--limit", "4")
    assert row["values"] == row["method"] == "rtn"
    assert "warning: --values is called --method now" in capsys.readouterr().err
    (row,) = rows_of("--method", "rtn", "--split", "none", "--limit", "4")
    assert "warning" not in capsys.readouterr().err


def test_a_comparison_is_a_gate(
    rows_of: Callable[..., list[dict[str, Any]]], classifier: Callable[..., Path], texts: Path, tmp_path: Path, capsys
) -> None:
    rows = rows_of("--split", "none,kmeans", "--fail-below", "agreement=0", "--fail-below", "logit_sqnr_db=-100")
    assert len(rows) == 2
    path = tmp_path / "below.json"
    common = ["compare", str(classifier("again")), "--data", str(texts), "--backend", "simulated", "--weights", "int2"]
    capsys.readouterr()
    assert run([*common, "--split", "none,kmeans", "--json", str(path), "--fail-below", "logit_sqnr_db=200"]) == 1
    assert len(json.loads(path.read_text())) == 2  # written for the one who wants to know
    said = [line for line in capsys.readouterr().err.splitlines() if "is below 200 dB" in line]
    assert len(said) == 1
    assert "simulated int2 split kmeans" in said[0]
    assert run([*common, "--fail-below", "0.5"]) == 2


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
    [(["--k", "2"], 4), (["--split", "kmeans", "--k", "5"], 8), (["--split", "grid", "--budget", "5.5"], 5)],
)
def test_equal_storage_adds_plain_rows(
    options: list[str], bits: int, rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = rows_of("--equal-storage", *options)
    assert (rows[-1]["backend"], rows[-1]["weights"], rows[-1]["split"]) == ("simulated", f"int{bits}", "none")
    assert sum(row["weights"] != "int2" for row in rows) == 1


def test_stock_quantizers_fix_the_weights(
    classifier: Callable[..., Path], texts: Path, tmp_path: Path, fails: Callable[..., str], capsys
) -> None:
    pytest.importorskip("torchao")
    common = ["compare", str(classifier()), "--data", str(texts), "--backend", "pt2e", "--quantizer", "x86-inductor"]
    assert "needs calibration data" in fails(*common)
    assert "--weights goes without --quantizer" in fails(*common, "--weights", "int2")
    assert "no stock quantizer 'toaster'" in fails(*common[:-1], "toaster", "--calibration", texts)
    simulated = [*common[:5], "simulated", *common[6:]]
    assert "backend simulated has no stock quantizers" in fails(*simulated, "--calibration", texts)
    path = tmp_path / "rows.json"
    assert run([*common, "--calibration", str(texts), "--k", "2", "--json", str(path)]) == 0
    plain, split = json.loads(path.read_text())
    assert (plain["quantizer"], plain["weights"], plain["granularity"]) == ("x86-inductor", "int8", "channel")
    assert split["layers_split"] == plain["layers_quantized"] == 8
    assert "x86-inductor" in capsys.readouterr().out


def test_plugins_lists_stock_quantizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    path = tmp_path / "plugins.json"
    assert run(["plugins", "--json", str(path)]) == 0
    (found,) = [row["quantizers"] for row in json.loads(path.read_text()) if row["name"] == "pt2e"]
    states = {row["quantizer"]: row["state"] for row in found}
    assert states["x86-inductor"] == "installed"
    assert len(states) > 20
    assert "stock quantizers" in capsys.readouterr().out
