"""The `grid` splitter beside scikit-learn's k-means on the same weights: seconds, their ratio, and decibels.

Run `python benchmarks/grid_search.py [--smoke] [--json FILE] [--threads N] [--runs N]`. Times are of the whole pass
over one layer of Student-t(4) weights, checks included. The decibels are signal-to-noise ratios of the weights: of
the parts as the grid rounds them, and of one tensor of k times the bits.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from _harness import alternate, report
from torch import Tensor, nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.grid import UniformGrid

# Bits, parts, and the grid.
SETTINGS = (
    (3, UniformGrid(2, "affine", "tensor")),
    (3, UniformGrid(2, "affine", "channel")),
    (3, UniformGrid(2, "affine", "group", 64)),
    (2, UniformGrid(2, "affine", "channel")),
    (3, UniformGrid(2, "symmetric", "channel")),
    (3, UniformGrid(2, "symmetric", "channel", symmetric_scale="full")),
    (2, UniformGrid(4, "affine", "channel")),
    (2, UniformGrid(4, "symmetric", "tensor")),
    (2, UniformGrid(8, "symmetric", "channel")),
)


def run(smoke: bool, runs: int = 3) -> list[dict[str, Any]]:
    """Measure; `smoke` takes a tiny layer and two settings, which show only that everything runs."""
    torch.manual_seed(0)
    side = 64 if smoke else 2048
    weight = torch.distributions.StudentT(4.0).sample((side, side)) * 0.02
    return [_compare(weight, k, grid, runs) for k, grid in (SETTINGS[:2] if smoke else SETTINGS)]


def _compare(weight: Tensor, k: int, grid: UniformGrid, runs: int) -> dict[str, Any]:
    from sklearn.cluster import KMeans

    def split() -> nn.Module:
        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        model[0].weight.data = weight.clone()
        return SplitQuantPass(splitter="grid", k=k).apply(model, grid=grid)

    parts = [part.weight.detach() for part in split().modules() if isinstance(part, nn.Linear)]
    (ours, theirs), ratio = alternate(
        split, lambda: KMeans(3, n_init="auto", random_state=0).fit(weight.numpy().reshape(-1, 1)), runs
    )
    total = torch.stack([grid.quantize_dequantize(part) for part in parts]).sum(dim=0)
    wider = UniformGrid(min(8, grid.bits * k), grid.scheme, grid.granularity, grid.group_size, grid.symmetric_scale)
    return {
        "grid": f"INT{grid.bits} {grid.scheme} {grid.symmetric_scale if grid.scheme == 'symmetric' else ''}".strip(),
        "per": grid.granularity if grid.group_size is None else f"group of {grid.group_size}",
        "k": k,
        "grid, s": ours,
        "k-means, s": theirs,
        "grid / k-means": ratio,
        "us per weight": ours / weight.numel() * 1e6,
        "parts, dB": _decibels(weight, total),
        "plain, dB": _decibels(weight, wider.quantize_dequantize(weight)) if grid.bits * k <= 8 else None,
    }


def _decibels(weight: Tensor, rounded: Tensor) -> float:
    signal, noise = weight.double().square().sum(), (weight.double() - rounded.double()).square().sum()
    return 10 * math.log10(float(signal / noise))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    title = "The grid splitter beside scikit-learn's KMeans(3) of all weights"
    report(title, run(arguments.smoke, 1 if arguments.smoke else arguments.runs), arguments.json)
