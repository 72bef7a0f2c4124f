"""Weights packed one at a time are bit for bit what INC's modules hold."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

with warnings.catch_warnings():  # torchao deprecates some of its own enums while INC imports it
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")  # INC wants it imported first
    pytest.importorskip("neural_compressor.torch.quantization")

from neural_compressor.torch.quantization import RTNConfig, quantize
from splitquant_inc import packer
from splitquant_inc.backend import IncBackend
from splitquant_inc.packing import packed_layer, rtn_layer

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.errors import ConfigError

FORMATS = [("int2", "affine"), ("int4", "affine"), ("int2", "symmetric"), ("int4", "symmetric"), ("int8", "symmetric")]


def packer_of(weights: str, scheme: Any, group_size: int | None) -> Any:
    backend = IncBackend()
    granularity: Any = "channel" if group_size is None else "group"
    return backend.packer(backend.resolve(WeightRequest(weights, granularity, group_size, scheme)))


def assert_packed_alike(layer: nn.Linear, weights: str, scheme: str, group_size: int | None) -> None:
    own = packer_of(weights, scheme, group_size)
    weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    found = own.pack(weight, bias, part=True)
    spec = own.spec(weight.shape, weight.dtype, part=True)
    assert {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in found.items()} == spec
    recipe = RTNConfig(
        bits=own.grid.bits, use_sym=scheme == "symmetric", group_size=group_size or -1, use_layer_wise=False
    )
    inc = quantize(nn.Sequential(layer), recipe)[0]
    described, expected = packed_layer(inc)
    assert rtn_layer(layer.in_features, layer.out_features, own.grid.bits, group_size) == described
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def some_weight(rows: int, width: int, seed: int) -> Tensor:
    """Mostly zeros, rows of nothing else, and rows with one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) ** 3 * 0.02
    weight *= torch.rand(rows, width, generator=generator) < 0.6
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.3, weight.abs(), weight)


@settings(max_examples=30)
@given(
    st.integers(1, 70),
    st.sampled_from([1, 7, 33, 64, 130]),
    st.sampled_from(FORMATS),
    st.sampled_from([None, 7, 32]),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.sampled_from([1, 1000, 1 << 19]),
    st.integers(0, 2**31),
)
def test_linear(rows, width, form, group_size, dtype, bias, block, seed):
    layer = nn.Linear(width, rows, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(some_weight(rows, width, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "BLOCK", block)
        assert_packed_alike(layer.to(dtype), *form, group_size)


@pytest.mark.parametrize("weights", ["int2", "int8"])
def test_symmetric_bfloat16(weights):
    layer = nn.Linear(33, 9).bfloat16()
    assert_packed_alike(layer, weights, "symmetric", None)


def test_asymmetric_bfloat16_is_what_it_is_in_32_bits():
    own = packer_of("int4", "affine", 7)
    weight = some_weight(9, 33, 0).bfloat16()
    found, expected = own.pack(weight, part=True), own.pack(weight.float(), part=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_layer_in_two_places_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = nn.Linear(4, 4)

    with pytest.raises(ConfigError, match="one is other too"):
        packer_of("int4", "affine", None).quantized(Twice())


def test_what_chooses_codes_by_other_means_is_not_streamed():
    backend = IncBackend()
    for method in ("hqq", "gptq"):
        assert backend.packer(backend.resolve(WeightRequest("int4", method=method))) is None
