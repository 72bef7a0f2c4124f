"""QuantoGrid says what quanto will do, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plan import LayerPlan

quanto = pytest.importorskip("optimum.quanto")

from splitquant_quanto.grid import QuantoGrid, group_size_of  # noqa: E402
from splitquant_quanto.optimizer import make_zero_exact  # noqa: E402
from splitquant_quanto.stored_layers import stored_bytes  # noqa: E402


def frozen(weight, bits):
    """What a real quanto layer, treated as a part is, holds of a weight."""
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    model = nn.Sequential(layer)
    quanto.quantize(model, weights=f"qint{bits}")
    make_zero_exact(model[0])
    quanto.freeze(model)
    return model[0].weight


def adversarial():
    row = torch.linspace(-1, 1, 24)
    return {
        "zeros": torch.zeros(3, 24),
        "a zero row": torch.stack([row, torch.zeros(24), -row]),
        "positive": row.abs().repeat(2, 1) + 1,
        "negative": -row.abs().repeat(2, 1) - 1,
        "constant": torch.full((2, 24), 0.7),
        "one value": torch.tensor([[2.5]]),
        "an outlier": torch.cat([row[None] / 100, torch.tensor([[50.0]]).expand(1, 1)], dim=1),
        "tiny": row.repeat(2, 1) * 1e-30,
        "huge": row.repeat(2, 1) * 1e30,
        "ties": torch.arange(-12, 12).repeat(2, 1) / 2.0,
        "mostly zero": torch.where(row.abs() > 0.9, row, 0).repeat(2, 1),
        "groups": torch.randn(3, 160),
        "no groups": torch.randn(3, 200),
        "groups of 128": torch.randn(2, 256) * torch.arange(256),
        "convolution": torch.randn(4, 3, 3, 3),
        "wide convolution": torch.randn(4, 32, 3, 3),
        "depthwise": torch.randn(4, 1, 3, 3),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", adversarial())
def test_adversarial_weights(case, bits):
    weight = adversarial()[case]
    assert torch.equal(QuantoGrid(bits).quantize_dequantize(weight), frozen(weight, bits).dequantize())


@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(1, 6),
    columns=st.sampled_from([1, 2, 24, 128, 160, 200, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_random_weights(bits, rows, columns, dtype, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    if (bits, columns, dtype) == (4, 256, torch.bfloat16):
        rows = 16  # quanto packs these for a kernel that takes multiples of 16 rows only
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    assert torch.equal(QuantoGrid(bits).quantize_dequantize(weight), frozen(weight, bits).dequantize())


def test_the_kernel_that_takes_16_rows_does_not_limit_what_is_measured():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rounded = QuantoGrid(4).quantize_dequantize(weight)
    assert torch.equal(QuantoGrid(4).quantize_dequantize(weight[:3]), rounded[:3])
    parts = SplitQuantPass(k=2).split_tensors("layer", LayerPlan("Linear", weight, None), QuantoGrid(4))
    assert tensors_error(weight, parts.weight) < tensors_error(weight, [weight]) / 80


def tensors_error(weight, parts):
    return float(
        (sum(QuantoGrid(4).quantize_dequantize(part).float() for part in parts) - weight.float()).square().sum()
    )


@given(
    bits=st.sampled_from([2, 4, 8]),
    shape=st.sampled_from([(3, 24), (3, 160), (4, 3, 3, 3), (4, 32, 3, 3), (1, 8)]),
    seed=st.integers(0, 99),
)
def test_its_parameters_are_those_of_its_rounding(bits, shape, seed):
    grid = QuantoGrid(bits)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    low, high = grid.quant_min, grid.quant_max
    rounded = []
    for groups in grid.groups(weight):
        scale, zero_point = grid.qparams(groups)
        assert scale.shape == (len(groups), 1)
        rounded.append(((torch.round(groups / scale) + zero_point).clamp(low, high) - zero_point) * scale)
    ours, theirs = grid.from_groups(rounded, weight.shape), grid.quantize_dequantize(weight)
    # Values on a boundary between two codes may fall to either side: quanto adds the shift before it divides.
    assert float((ours - theirs).abs().gt(1e-5).float().mean()) <= 0.05


@pytest.mark.parametrize(
    ("columns", "bits", "size"),
    [
        (128, 2, None),
        (160, 2, 32),
        (192, 4, 96),
        (200, 2, None),
        (256, 4, 128),
        (312, 2, None),
        (512, 2, 128),
        (512, 8, None),
    ],
)
def test_group_sizes_are_quantos(columns, bits, size):
    assert group_size_of(columns, bits) == size
    if bits < 8:
        layer = nn.Sequential(nn.Linear(columns, 2))
        quanto.quantize(layer, weights=f"qint{bits}")
        assert layer[0].weight_group_size == size


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 24), (8, 160), (8, 4, 3, 3)])
def test_stored_bits_are_what_quanto_stores(shape, bits):
    assert QuantoGrid(bits).stored_bits(torch.Size(shape)) == 8 * stored_bytes(frozen(torch.randn(shape), bits))


def test_what_it_says_of_itself():
    assert isinstance(QuantoGrid(2), Grid)
    assert (QuantoGrid(2).scheme, QuantoGrid(4).scheme, QuantoGrid(8).scheme) == ("affine", "affine", "symmetric")
    assert (QuantoGrid(2).granularity, QuantoGrid(2).group_size) == ("channel", None)
    with pytest.raises(ConfigError, match="2, 4 and 8 bits"):
        QuantoGrid(3)
