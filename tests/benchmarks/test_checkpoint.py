"""A smoke run of the checkpoint benchmark; nothing asserts a time."""

import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark limits memory as Linux does")
def test_checkpoint(python_path, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("optimum.quanto")
    import checkpoint

    for name, value in python_path().items():
        monkeypatch.setenv(name, value)
    (row,) = checkpoint.run(smoke=True, folder=tmp_path, rows=["int2-budget"])
    assert row["gain, dB"] > 10
    assert len(row["parts"].split("/")) > 1
    assert row["way"] == "streamed"
    assert row["limit, MiB"] == 2048
    assert 0 < row["peak RSS, MiB"] < 2048
    assert row["written, GB"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="reads the peak memory as Unix tells it")
def test_cluster(python_path, monkeypatch, tmp_path):
    for package in ("distributed", "transformers", "optimum.quanto"):
        pytest.importorskip(package)
    import cluster

    for name, value in python_path().items():
        monkeypatch.setenv(name, value)
    rows = cluster.run(smoke=True, folder=tmp_path)
    assert [row["way"] for row in rows] == ["one process", "1 worker", "2 workers"]
    assert all(row["MB/s"] > 0 and row["peak RSS, MiB"] > 0 for row in rows)
    assert not list(tmp_path.iterdir())
