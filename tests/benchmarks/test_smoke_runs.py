"""A smoke run of each benchmark; no test asserts a time."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_whole_pass() -> None:
    pytest.importorskip("transformers")
    import whole_pass

    bert, resnet = whole_pass.run(smoke=True)
    assert bert["layers split"] == 8
    assert resnet["layers split"] == 21


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torchao's own
def test_latency() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("optimum.quanto")
    pytest.importorskip("torchao")
    import latency

    rows = latency.run(smoke=True)
    assert len(rows) == 8 + 8 + 4
    assert all(row["ms"] > 0 for row in rows)


def test_sparse_parts() -> None:
    import sparse_parts

    rows = sparse_parts.run(smoke=True)
    assert [row["parts"] for row in rows] == ["dense", "sparse", "outer sparse", "fused"] * 2
    assert sum(map(float, rows[0]["share of weights"].split("/"))) > 0.99


def test_a_stacked_layer_computes_what_the_split_one_does() -> None:
    import latency
    import torch

    from splitquant_plugins import SplitQuantPass

    torch.manual_seed(0)
    split = SplitQuantPass(k=3)(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4, bias=False)).eval())
    inputs = torch.randn(2, 3, 6)
    expected = split(inputs)
    stacked = latency.stack(split)
    assert [type(layer) for layer in stacked] == [latency.Stacked, latency.Stacked]
    assert torch.allclose(stacked(inputs), expected, atol=1e-6)


def test_causal_lm() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("neural_compressor.torch")
    import causal_lm

    rows = {row["values"]: row for row in causal_lm.run(smoke=True)}
    assert {"FP32", "RTN", "HQQ", "GPTQ", "decoupleQ"} <= rows.keys()
    assert rows["decoupleQ"]["layers"] == rows["RTN"]["layers"] == 14
    assert rows["decoupleQ"]["bits/weight"] == rows["RTN"]["bits/weight"]


def test_two_bits(tmp_path: Path) -> None:
    pytest.importorskip("neural_compressor.torch")
    import two_bits

    only = "RTN; decoupleQ/2/1; auto/2/2"
    arguments = argparse.Namespace(
        **{"story": None, "texts": None, "model": tmp_path, "group_size": 32, "only": only, "smoke": True},
        **{"seeds": 2, "first_seed": 0, "json": tmp_path / "table.json"},
    )
    single = two_bits.run(arguments)
    lines = (tmp_path / "table.rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == single
    rows = two_bits.summary(single)
    assert [(row["method"], row["format"], row["k"], row["n"]) for row in rows] == [
        ("FP32", "", 1, 2),
        ("RTN", "INT2", 1, 2),
        ("decoupleQ", "INT2", 1, 2),
        ("RTN", "INT4", 1, 2),
        ("auto", "INT2", 2, 2),
    ]
    plain, solved, _, split = rows[1:]
    assert rows[0]["KL"] == 0
    assert split["KL"] < plain["KL"]
    assert split["bits/weight"] == 2 * plain["bits/weight"] == 2 * solved["bits/weight"]
    assert plain["KL from-to"]


def test_restricted_grids() -> None:
    pytest.importorskip("transformers")
    import restricted_grids

    rows = restricted_grids.run(restricted_grids.bert_tiny(1, 32), None, (2,), restricted_grids.SMOKE)
    assert len(rows) == 6
    by_splitter = {row["splitter"]: row["weights, dB"] for row in rows if row["grid"] == "symmetric full, channel"}
    assert by_splitter["grid"] > by_splitter["residual"] > by_splitter["kmeans"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pass_memory() -> None:
    import pass_memory
    import torch

    rows = pass_memory.run(smoke=True)
    rows.append(pass_memory.child(64, 3, "bfloat16", torch.get_num_threads()))  # in this process: they take seconds
    assert [row["layers"] for row in rows] == ["3 x 64x64 float32", "3 x 64x64 bfloat16"]
    assert all(row["model, MB"] < row["parts + 2 layers, MB"] for row in rows)


def test_one_command_runs_them_and_importing_the_package_is_light(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS), "--smoke", "--only", "import_time", "--json", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package, split_pass, torch = json.loads((tmp_path / "import_time.json").read_text("utf-8"))["rows"]
    assert package["pulls in"] == "none of the heavy packages"
    assert "sklearn" not in split_pass["pulls in"]
    assert "transformers" not in split_pass["pulls in"]
    assert torch["times import torch"] == 1
    done = subprocess.run([*command[:3], "--only", "nothing"], capture_output=True, text=True, check=False)
    assert "no benchmark 'nothing'; choose from import_time" in done.stderr


def test_the_one_command_knows_every_benchmark() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("[!_]*.py")}
    scripts -= {"stock_quantizers", "optimum_onnx"}  # need others' packages, in environments of their own
    assert scripts == set(runpy.run_path(str(BENCHMARKS / "__main__.py"))["NAMES"])


def test_grid_search() -> None:
    import grid_search

    tensor, channel = grid_search.run(smoke=True, runs=1)
    assert channel["parts, dB"] > tensor["parts, dB"]
    assert tensor["parts, dB"] > tensor["plain, dB"]


def test_solve_checkpoint() -> None:
    pytest.importorskip("transformers")
    import solve_checkpoint

    (row,) = solve_checkpoint.run(smoke=True, sequences=2, fast=True, folder=None)
    assert row["layers"] == 7
    assert row["error before / after"] > 1
    assert row["seconds of the block"] > 0
