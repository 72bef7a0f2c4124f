"""The exact one-dimensional k-means beside scikit-learn's: seconds, ratio, and inertia.

Run `python benchmarks/clustering.py [--smoke] [--json FILE] [--threads N]`. Both sides run in turn in one
process, on the same values, with the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splitquant_plugins.clustering import masked_parts, optimal_clusters

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from _harness import alternate, report

# The convolutions of ResNet-18: (output channels, values per kernel) and how many there are.
RESNET18 = (
    [(64, 147)]
    + [(64, 576)] * 4
    + [(128, 576), (128, 64)]
    + [(128, 1152)] * 3
    + [(256, 1152), (256, 128)]
    + [(256, 2304)] * 3
    + [(512, 2304), (512, 256)]
    + [(512, 4608)] * 3
)


def run(smoke: bool, runs: int = 3) -> list[dict[str, Any]]:
    """Measure; `smoke` takes tiny sizes that show only that everything runs."""
    generator = np.random.default_rng(0)
    side = 128 if smoke else 4096
    layer = torch.from_numpy(generator.standard_t(4, size=(1, side * side)).astype(np.float32))
    shapes = [(4, 147), (4, 576)] if smoke else RESNET18
    convolutions = [
        torch.from_numpy(generator.standard_normal(shape).astype(np.float32) * (2 / shape[1]) ** 0.5)
        for shape in shapes
    ]
    runs = 1 if smoke else runs
    layer_name = f"one {side}x{side} layer, Student-t(4)"
    kernels = sum(shape[0] for shape in shapes)
    return [
        _compare(layer_name, [layer], runs, parts=False),
        _compare(f"{layer_name}, with parts", [layer], runs, parts=True),
        _compare(f"ResNet-18 convolutions, each of {kernels} kernels", convolutions, runs, parts=False),
    ]


def _compare(name: str, tensors: list[Tensor], runs: int, parts: bool) -> dict[str, Any]:
    ours: list[float] = []
    theirs: list[float] = []

    def exact() -> None:
        found = [optimal_clusters(tensor, 3) for tensor in tensors]
        if parts:
            for tensor, clusters in zip(tensors, found, strict=True):
                masked_parts(tensor, clusters.boundaries)
        ours[:] = [value for clusters in found for value in clusters.inertia.tolist()]

    def sklearn() -> None:
        theirs[:] = [_sklearn_inertia(row) for tensor in tensors for row in tensor]

    exact()
    _sklearn_inertia(tensors[0][:1, :512][0])
    (slow, fast), ratio = alternate(sklearn, exact, runs)
    quotients = [one / two for one, two in zip(ours, theirs, strict=True)]
    return {
        "case": name,
        "sklearn_s": slow,
        "exact_s": fast,
        "ratio": ratio,
        "inertia_mean": float(np.mean(quotients)),
        "inertia_worst": max(quotients),
    }


def _sklearn_inertia(row: Tensor) -> float:
    """Fit, and the inertia in float64: scikit-learn sums float32 values in float32."""
    from sklearn.cluster import KMeans

    model = KMeans(3, n_init="auto", random_state=0).fit(row.numpy()[:, None])
    values = row.double().numpy()
    weight = np.bincount(model.labels_)
    moment = np.bincount(model.labels_, weights=values)
    return float(values @ values - (moment * moment / weight).sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a second or two")
    parser.add_argument("--json", help="write the rows and the machine to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(options.threads):
        rows = run(options.smoke, options.runs)
    report("One-dimensional k-means, k = 3: scikit-learn and exact", rows, options.json)


if __name__ == "__main__":
    main()
