"""What was left out is said: shares of the values, and each large tensor that stays float with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.evaluation.coverage import coverage, float_tensors, sentences
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend


def covered(model, split_pass):
    tensors = float_tensors(model)
    backend = SimulatedBackend()
    chosen = backend.resolve(WeightRequest("int4"))
    quantized = backend.quantize(copy.deepcopy(model), chosen, split_pass)
    return coverage(tensors, quantized.layers, quantized.manifest)


def test_shares_and_the_embedding():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    found = covered(model, SplitQuantPass(exclude="2"))
    total = 400 + 64 + 8 + 32 + 4
    assert found["split_share"] == pytest.approx(64 / total)
    assert found["quantized_share"] == pytest.approx((64 + 32) / total)
    named = {each["tensor"]: each["reason"] for each in found["left_float"]}
    assert "is looked up" in named["0.weight"]
    assert named.keys() == {"0.weight", "1.bias", "2.bias"}
    assert any("0.weight [50, 8] stays float" in line for line in sentences(found))


def test_experts_of_a_mixture_are_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    stacked = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if not stacked:
        pytest.skip("this release of transformers keeps each expert as a layer")
    found = covered(model, SplitQuantPass())
    named = {each["tensor"]: each["reason"] for each in found["left_float"]}
    assert set(stacked) <= set(named)
    assert all("weights of 4 experts as one tensor" in named[name] for name in stacked)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert found["quantized_share"] < 1 - sum(model.get_parameter(name).numel() for name in stacked) / held
    assert torch.isfinite(torch.tensor(found["split_share"]))
