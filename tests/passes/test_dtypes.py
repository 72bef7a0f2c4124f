"""Weights of every dtype: the float ones are split, the others refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.errors import InputError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_float_models_keep_their_dtype_and_function(models, images, dtype, assert_same_function, sum_of_parts):
    model = models.conv().to(dtype)
    folded = SplitQuantPass(k=1)(copy.deepcopy(model))  # one part: folded, and nothing else
    model = SplitQuantPass()(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for record in manifest_of(model).split:
        assert record.dtype == str(dtype).removeprefix("torch.")
        for role in ("weight", "bias"):
            original = getattr(folded.get_submodule(record.name), role)
            assert torch.equal(sum_of_parts(model.get_submodule(record.name), role), original)
    assert_same_function(model, folded, images.to(dtype), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_two_dtypes(dtype, sum_of_parts):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, dtype=dtype))
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert [record.dtype for record in manifest_of(model).split] == ["float32", str(dtype).removeprefix("torch.")]
    for number in range(2):
        assert torch.equal(sum_of_parts(model[number]), reference[number].weight)


@pytest.mark.parametrize("scale", [1e-40, 1e-7, 1e30])
def test_tiny_and_huge_weights(scale, sum_of_parts):
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    before = model[0].weight.detach().clone()
    model = SplitQuantPass()(model)
    assert torch.equal(sum_of_parts(model[0]), before)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.complex64, torch.bool]
)
def test_other_dtypes_are_refused(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(InputError, match=rf"1\.weight is {dtype}; a split takes float64, float32, float16, bfloat16"):
        SplitQuantPass()(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("out", "inputs"), [(0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_layer_is_kept(out, inputs):
    model = SplitQuantPass()(nn.Sequential(nn.Linear(inputs, out), nn.Linear(3, 3)))
    assert [record.name for record in manifest_of(model).kept] == ["0"]


def test_a_non_contiguous_weight(sum_of_parts):
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    model[0].weight = nn.Parameter(torch.randn(6, 4).t())
    model[1].to(memory_format=torch.channels_last)
    before = [layer.weight.detach().clone() for layer in model]
    model = SplitQuantPass()(model)
    for split, weight in zip(model, before, strict=True):
        assert torch.equal(sum_of_parts(split), weight)
