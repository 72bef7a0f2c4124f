"""The products of a k-means split's parts, of which all but one hold a zero for each weight: dense, and sparse (CSR).

Run `python benchmarks/sparse_parts.py [--smoke] [--json FILE] [--threads N]`. Every row is timed in turn with the
unsplit product, in one process. `sparse` holds all parts as torch's CSR tensors, `outer sparse` the lower and the upper
one, and the middle one, which most weights are in, dense. `fused` is one product with the sum of the parts.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _harness import alternate, report
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass


def run(smoke: bool, runs: int = 15) -> list[dict[str, Any]]:
    """Measure a square layer of 1024 with heavy-tailed weights, for one row of inputs and for 64."""
    width = 32 if smoke else 1024
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(width, width, generator=generator))
        layer.weight[torch.rand(width, width, generator=generator) > 0.99] *= 6
    whole = layer.weight.detach()
    split = SplitQuantPass(splitter="kmeans")(nn.Sequential(layer))[0]
    parts = [part.weight.detach() for part in split.parts()]
    with warnings.catch_warnings():  # torch calls its CSR tensors a beta
        warnings.simplefilter("ignore")
        sparse = [part.to_sparse_csr() for part in parts]
        rows = []
        for count in (1, 64):
            inputs = torch.randn(width, count, generator=generator)
            outer = [sparse[0], *parts[1:-1], sparse[-1]]
            for name, weights in (
                ("dense", parts),
                ("sparse", sparse),
                ("outer sparse", outer),
                ("fused", [sum(parts)]),
            ):
                rows.append(
                    _row(name, _product(weights, inputs), _product([whole], inputs), count, 1 if smoke else runs)
                )
    share = [float((part != 0).double().mean()) for part in parts]
    return [{**row, "share of weights": "/".join(f"{each:.3f}" for each in share)} for row in rows]


def _product(weights: list[Any], inputs: Tensor) -> Callable[[], Tensor]:
    def product() -> Tensor:
        total: Tensor = weights[0] @ inputs
        for weight in weights[1:]:
            total = total + weight @ inputs
        return total

    return product


def _row(name: str, ours: Callable[[], Tensor], base: Callable[[], Tensor], count: int, runs: int) -> dict[str, Any]:
    assert torch.allclose(ours(), base(), rtol=1e-3, atol=1e-3)
    (one, other), ratio = alternate(ours, base, runs)
    return {"parts": name, "rows": count, "ms": 1000 * one, "unsplit, ms": 1000 * other, "times unsplit": ratio}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report("Products of k-means parts, 1024 by 1024, float32", run(arguments.smoke), arguments.json, ("torch",))
