"""How good INT2 gets on the linear grids of restricted targets, and how far from a bound.

Run `python benchmarks/restricted_grids.py --model FOLDER --data CSV [--limit N] [--parts 3,2] [--json FILE]`, or
`--smoke`. Every Linear weight becomes the sum of its parts rounded by `UniformGrid`; biases stay float. All
columns but the accuracy are signal-to-noise ratios of the weights in decibels:

- `bound`: the best additive code per weight, given scales: k free codes, not held to sum to the weight;
- `plain`: one tensor of k times the bits, which takes the same storage.
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any

import torch
from _harness import report
from _models import bert_tiny

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.backends import WeightRequest, run_of
from splitquant_plugins.evaluation.compare import load_subject
from splitquant_plugins.evaluation.metrics import linear_weights, ratio_db
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend
from splitquant_plugins.evaluation.subject import Subject
from splitquant_plugins.grid import UniformGrid
from splitquant_plugins.splitters._bound import additive_bound

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from splitquant_plugins.backends import QuantizedModel, WeightFormat
    from splitquant_plugins.grid import Grid

GRIDS = {
    "affine, tensor": UniformGrid(2, "affine", "tensor"),
    "affine, channel": UniformGrid(2, "affine", "channel"),
    "symmetric restricted, tensor": UniformGrid(2, "symmetric", "tensor"),
    "symmetric restricted, channel": UniformGrid(2, "symmetric", "channel"),
    "symmetric full, tensor": UniformGrid(2, "symmetric", "tensor", symmetric_scale="full"),
    "symmetric full, channel": UniformGrid(2, "symmetric", "channel", symmetric_scale="full"),
}
SMOKE = ("affine, tensor", "symmetric full, channel")
SPLITTERS = ("kmeans", "residual", "grid")


def run(
    model: nn.Module, subject: Subject | None, parts: Sequence[int] = (3, 2), grids: Sequence[str] = tuple(GRIDS)
) -> list[dict[str, Any]]:
    """One row per grid, number of parts and splitter; without a subject there is no accuracy."""
    weights = linear_weights(model)
    rows = []
    for name in grids:
        grid = GRIDS[name]
        for k in parts:
            bound = sum(additive_bound(weight, grid, k) for weight in weights.values())
            wider = UniformGrid(2 * k, grid.scheme, grid.granularity, symmetric_scale=grid.symmetric_scale)
            plain = _noise(weights, {key: wider.quantize_dequantize(weight) for key, weight in weights.items()})
            for splitter in SPLITTERS:
                rounded = _OnGrid(grid).quantized(model, SplitQuantPass(splitter=splitter, k=k))
                rows.append(
                    {
                        "grid": name,
                        "k": k,
                        "splitter": splitter,
                        "accuracy": None if subject is None else _accuracy(rounded.model, subject),
                        "weights, dB": ratio_db(_signal(weights), _noise(weights, _sums(rounded))),
                        "bound, dB": ratio_db(_signal(weights), bound),
                        "plain of 2k bits, dB": ratio_db(_signal(weights), plain),
                    }
                )
    return rows


class _OnGrid(SimulatedBackend):
    """The simulated backend on one grid, also on those that it offers no name for."""

    def __init__(self, grid: UniformGrid) -> None:
        self._grid = grid

    def grid(self, chosen: WeightFormat) -> Grid:
        return self._grid

    def quantized(self, model: nn.Module, first: SplitQuantPass) -> QuantizedModel:
        return self.quantize(copy.deepcopy(model), self.resolve(WeightRequest("int2")), first)


def _sums(quantized: QuantizedModel) -> dict[str, Tensor]:
    """What the parts of each layer add up to."""
    return {
        name: torch.stack([part.weight.double() for part in parts]).sum(0) for name, parts in quantized.layers.items()
    }


def _signal(weights: Mapping[str, Tensor]) -> float:
    return sum(float(weight.double().square().sum()) for weight in weights.values())


def _noise(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return sum(float((weight.double() - others[name]).square().sum()) for name, weight in weights.items())


def _accuracy(model: nn.Module, subject: Subject) -> float:
    return float(subject.measure(run_of(model))["accuracy"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a classifier")
    parser.add_argument("--data", help="csv with the columns text and label")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--parts", default="3,2")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke:
        report("INT2 on restricted grids, untrained", run(bert_tiny(1, 32), None, (2,), SMOKE), arguments.json)
    elif not arguments.model or not arguments.data:
        parser.error("--model and --data, or --smoke")
    else:
        chosen = load_subject(arguments.model, arguments.data, arguments.limit)
        numbers = [int(number) for number in arguments.parts.split(",")]
        title = f"INT2 on restricted grids, n = {chosen.examples.count}, float {_accuracy(chosen.model, chosen):.4f}"
        report(title, run(chosen.model, chosen, numbers), arguments.json)
