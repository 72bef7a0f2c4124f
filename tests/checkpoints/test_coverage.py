"""What was left out is said: shares of the values, and each large tensor that stays float with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import Manifest, SplitQuantPass, manifest_of
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.coverage import coverage, float_tensors, note_quantized, sentences
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
    assert found.split_share == pytest.approx(64 / total)
    assert found.quantized_share == pytest.approx((64 + 32) / total)
    named = {each.tensor: each.reason for each in found.left_float}
    assert "is looked up" in named["0.weight"]
    assert named.keys() == {"0.weight", "1.bias", "2.bias"}
    assert any("0.weight [50, 8] stays float" in line for line in sentences(found))


def test_the_manifest_of_a_pass_tells_its_share():
    model = SplitQuantPass(exclude="2")(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval())
    found = manifest_of(model).coverage
    assert (found.values, found.quantized_share) == (508, None)
    assert found.split_share == pytest.approx(64 / 508)
    named = {each.tensor: each.reason for each in found.left_float}
    assert named["2.weight"] == "an exclude pattern matches it"
    assert "1.weight" not in named
    assert sentences(found)[0] == "Of the model's values, 12.6% split."
    assert Manifest.model_validate_json(manifest_of(model).model_dump_json()).coverage == found


def test_the_manifest_tells_what_the_backend_quantized():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    tensors, backend = float_tensors(model), SimulatedBackend()
    quantized = backend.quantize(model, backend.resolve(WeightRequest("int4")), SplitQuantPass(exclude="2"))
    assert quantized.manifest.coverage == coverage(tensors, quantized.layers, quantized.manifest)


def test_a_split_layer_that_the_backend_left_float_is_named():
    manifest = manifest_of(SplitQuantPass()(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()))
    note_quantized(manifest, ["1"])
    assert manifest.coverage.quantized_share == pytest.approx(32 / 108)
    named = {each.tensor: each.reason for each in manifest.coverage.left_float}
    assert "left its parts float" in named["0.weight"]
    assert "1.weight" not in named


def test_small_tensors_are_counted_and_not_named():
    model = nn.Sequential(nn.Linear(100, 98), nn.LayerNorm(48), nn.LayerNorm(55))  # 10104 values: 51 are large
    named = [each.tensor for each in coverage(float_tensors(model), ["0"], None).left_float]
    assert named == ["0.bias", "2.weight", "2.bias"]


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
    named = {each.tensor: each.reason for each in found.left_float}
    assert set(stacked) <= set(named)
    assert all("weights of 4 experts as one tensor" in named[name] for name in stacked)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert found.quantized_share < 1 - sum(model.get_parameter(name).numel() for name in stacked) / held
    assert torch.isfinite(torch.tensor(found.split_share))
