from __future__ import annotations

from clustering import run


def test_the_benchmark_runs_on_tiny_sizes():
    rows = run(smoke=True)
    assert len(rows) == 3
    for row in rows:
        assert row["sklearn_s"] > 0
        assert row["exact_s"] > 0
        assert 0 < row["inertia_worst"] <= 1 + 1e-6
