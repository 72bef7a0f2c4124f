"""A smoke run of each benchmark; no test asserts a time."""

import pytest


def test_import_time() -> None:
    import import_time

    package, split_pass, torch = import_time.run(smoke=True)
    assert package["pulls in"] == "none of the heavy packages"
    assert "sklearn" not in split_pass["pulls in"]
    assert "transformers" not in split_pass["pulls in"]
    assert torch["times import torch"] == 1


def test_whole_pass() -> None:
    pytest.importorskip("transformers")
    import whole_pass

    bert, resnet = whole_pass.run(smoke=True)
    assert bert["layers split"] == 8
    assert resnet["layers split"] == 21


def test_latency() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("optimum.quanto")
    import latency

    rows = latency.run(smoke=True)
    assert len(rows) == 6
    assert all(row["ms"] > 0 for row in rows)


def test_causal_lm() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("neural_compressor.torch")
    import causal_lm

    rows = {row["values"]: row for row in causal_lm.run(smoke=True)}
    assert {"FP32", "RTN", "HQQ", "GPTQ", "decoupleQ"} <= rows.keys()
    assert rows["decoupleQ"]["layers"] == rows["RTN"]["layers"] == 14
    assert rows["decoupleQ"]["bits/weight"] == rows["RTN"]["bits/weight"]
