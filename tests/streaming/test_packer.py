"""Weights packed one at a time are bit for bit what quanto's modules save."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

quanto = pytest.importorskip("optimum.quanto")

from splitquant_quanto import packer  # noqa: E402
from splitquant_quanto.optimizer import make_zero_exact  # noqa: E402

from splitquant_plugins.checkpoints.headers import TensorSpec  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def by_quanto(layer, bits, part):
    model = nn.Sequential(layer)
    quanto.quantize(model, weights=f"qint{bits}")
    if part:
        make_zero_exact(model[0])
    quanto.freeze(model)
    return {name.removeprefix("0."): tensor for name, tensor in model.state_dict().items()}


def assert_packed_alike(layer, bits, part):
    quanto_packer = packer.QuantoPacker(bits)
    weight = layer.weight.detach().clone()
    found = quanto_packer.pack(weight, part=part)
    spec = quanto_packer.spec(weight.shape, weight.dtype, part=part)
    assert {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in found.items()} == spec
    expected = by_quanto(layer, bits, part)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.sampled_from([1, 7, 33, 96, 128, 130, 160, 192, 224]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([1, 1000, 5000, 1 << 19]),
    st.integers(0, 2**31),
)
def test_linear(rows, width, bits, dtype, part, block, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, rows, bias=False)
    weight = torch.randn(rows, width, generator=generator) ** 3 * 0.02
    if part:  # mostly zeros, and some rows of nothing else
        weight *= torch.rand(rows, width, generator=generator) < 0.3
        weight[torch.rand(rows, generator=generator) < 0.2] = 0
    with torch.no_grad():
        layer.weight.copy_(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "BLOCK", block)
        assert_packed_alike(layer.to(dtype), bits, part)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("rows", [16, 80])
def test_the_format_of_torchs_own_kernel(monkeypatch, rows, part):
    monkeypatch.setattr(packer, "BLOCK", 3000)
    layer = nn.Linear(256, rows, bias=False)
    with torch.no_grad():  # ranges far from symmetric, whose shifts that format rounds
        layer.weight.copy_(torch.rand(rows, 256) ** 3 - 0.1 * torch.rand(rows, 1))
    assert_packed_alike(layer.to(torch.bfloat16), 4, part)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 9, 3), (16, 66, 3), (32, 40, 1)])
def test_convolutions(monkeypatch, bits, dtype, sizes):
    inputs, outputs, kernel = sizes
    monkeypatch.setattr(packer, "BLOCK", 700)
    assert_packed_alike(nn.Conv2d(inputs, outputs, kernel, bias=False).to(dtype), bits, True)
