"""The grid agrees bit for bit with what convert_pt2e stores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from splitquant_pt2e import LowBitWeightQuantizer, Pt2eGrid, stored_weights
from splitquant_pt2e.compat import (
    convert_pt2e,
    prepare_pt2e,
)
from splitquant_pt2e.layers import stamp_names
from torch import Tensor, nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid

CHOICES = [
    {"granularity": granularity, "scheme": scheme, "symmetric_scale": rule}
    for granularity in ("channel", "tensor")
    for scheme, rule in (("affine", "restricted"), ("symmetric", "restricted"), ("symmetric", "full"))
]


def converted(weight: Tensor, quantizer: LowBitWeightQuantizer) -> Tensor:
    """What PT2E itself makes of a weight."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    model.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype)
    prepared = prepare_pt2e(torch.export.export(nn.Sequential(model), (x,)).module(), quantizer)
    prepared(x)
    graph = convert_pt2e(prepared)
    linear = next(node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default)
    dequantize = linear.args[1]
    args = [getattr(graph, a.target) if isinstance(a, torch.fx.Node) else a for a in dequantize.args]
    return dequantize.target(*args, **dequantize.kwargs)


def adversarial() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 32, generator=generator)
    rows[0] = 0
    rows[1] = 0.3
    rows[2] = -0.3
    rows[3] = rows[3].abs() + 1
    rows[4] = -rows[4].abs()
    rows[5] *= 1e30
    rows[6] *= 1e-30
    rows[7, 1:] = 0
    rows[8] = torch.linspace(-2, 1, 32)
    rows[9] = torch.arange(32) / 2 - 8  # many values half way between two codes
    rows[10] *= 1e-44
    return rows


@pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(options.values()))
def test_grid_is_what_convert_stores(weights, options):
    quantizer = LowBitWeightQuantizer(weights, **options)
    wild = adversarial()
    # one row alone decides the scale per tensor: leave the huge one out there, and try it by itself
    tensors = [wild] if options["granularity"] == "channel" else [wild[[0, 1, 3, 4, 8, 9]], wild[5:6], wild[6:7]]
    for tensor in tensors:
        assert torch.equal(quantizer.grid.quantize_dequantize(tensor), converted(tensor, quantizer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_half_precision(dtype, granularity):
    quantizer = LowBitWeightQuantizer("int4", granularity=granularity)
    weight = torch.randn(8, 16).to(dtype)
    found = converted(weight, quantizer)
    assert found.dtype == dtype
    assert torch.equal(quantizer.grid.quantize_dequantize(weight), found)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_round_per_output_channel(kind):
    model = nn.Sequential(kind(4, 6, 3, groups=2))
    quantizer = LowBitWeightQuantizer("int2")
    image = torch.randn(1, 4, *[5] * (model[0].weight.ndim - 2))
    graph = torch.export.export(model, (image,)).module()
    stamp_names(graph)
    prepared = prepare_pt2e(graph, quantizer)
    prepared(image)
    ((weight,),) = stored_weights(convert_pt2e(prepared)).values()
    assert torch.equal(weight.weight, quantizer.grid.quantize_dequantize(model[0].weight))


@given(st.integers(0, 2**32 - 1), st.sampled_from(CHOICES), st.sampled_from([2, 4, 8]), st.floats(-20, 20))
def test_grid_properties(seed, options, bits, magnitude):
    grid = LowBitWeightQuantizer(f"int{bits}", **options).grid
    assert isinstance(grid, Grid)
    assert grid.bits == bits
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    weight[weight.abs() < 0.2 * 10**magnitude] = 0
    rounded = grid.quantize_dequantize(weight)
    assert (rounded[weight == 0] == 0).all()
    (groups,) = grid.groups(weight)
    scale, _ = grid.qparams(groups)
    error = (grid.from_groups([groups], weight.shape) - rounded).abs()
    clipped = options["symmetric_scale"] == "full"  # PT2E's rule has no code for the largest positive values
    assert (error <= scale * (1.01 if clipped else 0.51)).all()
    codes, _, _ = grid.quantize(groups)
    assert codes.min() >= grid.quant_min
    assert codes.max() <= grid.quant_max


def test_restricted_is_the_rule_of_npus():
    grid = LowBitWeightQuantizer("int2", scheme="symmetric").grid
    assert (grid.quant_min, grid.quant_max) == (-1, 1)
    assert grid.quantize_dequantize(torch.tensor([[-1.0, 0.4, 0.6, 1.0]])).tolist() == [[-1.0, 0.0, 1.0, 1.0]]


def test_x86_grid_floors_scales_as_its_observer_does(x86, split, quantize):
    """Its observer has eps = 2**-12, which rounds small weights away."""
    model = nn.Sequential(nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight *= 0.01
    graph = quantize(model, split(splitter="kmeans") + x86(), torch.randn(2, 16))
    parts = stored_weights(graph)["0"]
    grid = Pt2eGrid(-128, 127, "symmetric", "channel", 2**-12)
    lower = [torch.where(part.weight != 0, model[0].weight, 0) for part in parts]
    assert all(torch.equal(grid.quantize_dequantize(low), part.weight) for low, part in zip(lower, parts, strict=True))


@pytest.mark.parametrize(("lowest", "highest"), [(0, 511), (-256, 255), (3, 1), (1, 15), (-8, 0)])
def test_impossible_codes(lowest, highest):
    with pytest.raises(ConfigError, match="codes"):
        Pt2eGrid(lowest, highest)


def test_unsigned_codes_are_affine():
    grid = Pt2eGrid(0, 15)
    values = torch.tensor([[-1.0, 0.0, 0.25, 2.0]])
    assert torch.equal(grid.quantize_dequantize(values), Pt2eGrid(-8, 7).quantize_dequantize(values))
    with pytest.raises(ConfigError, match="unsigned ones are affine"):
        Pt2eGrid(0, 15, "symmetric")
