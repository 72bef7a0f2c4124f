"""Figures of transformers' Conv1D, whose weight is stored [in, out]: rows are output channels there, too."""

from __future__ import annotations

import copy

import pytest
import torch

from splitquant_plugins import SplitQuantPass, UniformGrid
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.evaluation.metrics import measure_weights, ratio_db
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend


@pytest.mark.parametrize("split", [None, "kmeans"])
@pytest.mark.parametrize("shape", [(6, 10), (8, 8)])
def test_w5_decibels_and_bits_of_a_conv1d(shape, split):
    transformers = pytest.importorskip("transformers")
    model = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(shape[1], shape[0])).eval()
    torch.nn.init.normal_(model[0].weight)
    weight = model[0].weight.detach().t().clone()
    backend = SimulatedBackend()
    chosen = backend.resolve(WeightRequest("int4"))
    first = None if split is None else SplitQuantPass(splitter=split)
    quantized = backend.quantize(copy.deepcopy(model), chosen, first)
    found = measure_weights(quantized, model)
    grid = UniformGrid(4)
    parts = [weight]
    if first is not None:
        twin = SplitQuantPass(splitter=split)(copy.deepcopy(model))
        parts = [part.weight.detach() for part in twin[0].parts()]
    total = sum(grid.quantize_dequantize(part) for part in parts)
    expected = ratio_db(float(weight.double().square().sum()), float((weight.double() - total.double()).square().sum()))
    assert found.weight_sqnr_db == pytest.approx(expected, abs=1e-4)
    assert found.linear_bits_per_weight == len(parts) * grid.stored_bits(weight.shape) / weight.numel()
    x = torch.randn(3, shape[0])
    torch.testing.assert_close(quantized.model(x), x @ total.t() + model[0].bias)
