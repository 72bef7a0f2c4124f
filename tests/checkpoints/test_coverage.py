"""What was left out is said: shares of the values, and each large tensor that stays float with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import Manifest, SplitConfig, SplitQuantPass, manifest_of
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.checkpoints.coverage import (
    Coverage,
    FloatRecord,
    FloatTensor,
    coverage,
    coverage_of,
    float_tensors,
    note_quantized,
    sentences,
    why,
    with_reasons,
)
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend
from splitquant_plugins.manifest import LayerRecord


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


def test_the_parameters_of_a_model_each_once_with_their_owners():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Sequential(nn.Linear(2, 5, bias=False), nn.LazyLinear(3)))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    assert float_tensors(model) == [
        FloatTensor("scale", "", "Sequential", (), 1, False),
        FloatTensor("0.weight", "0", "Embedding", (5, 2), 10, True),
        FloatTensor("1.0.weight", "1.0", "Linear", (5, 2), 10, False),
        FloatTensor("1.1.weight", "1.1", "LazyLinear", (), 0, False),
        FloatTensor("1.1.bias", "1.1", "LazyLinear", (), 0, False),
    ]
    model[1][0].weight = model[0].weight
    assert [tensor.name for tensor in float_tensors(model)][:2] == ["scale", "0.weight"]
    assert sum(tensor.values for tensor in float_tensors(model)) == 11


def tensor(name: str, values: int, kind: str = "Linear", is_embedding: bool = False) -> FloatTensor:
    return FloatTensor(name, name.rpartition(".")[0], kind, (values,), values, is_embedding)


def by_hand(*layers: LayerRecord) -> Manifest:
    return Manifest(config=SplitConfig(), layers=list(layers))


TENSORS = [
    *(tensor("a.weight", 500), tensor("a.bias", 5), tensor("b.weight", 300), tensor("b.bias", 4)),
    *(tensor("c.inner.weight", 191), tensor("empty.weight", 0)),
]
LAYERS = [
    LayerRecord(name="z", kind="linear", action="split", also_known_as=("a",)),
    LayerRecord(name="y", kind="linear", action="kept", also_known_as=("c.inner",), reason="it is round"),
]


def test_shares_by_hand():
    """Of 1000 values a is split, under its second name; b is of no layer, and c was kept for a reason."""
    found = coverage(TENSORS, None, by_hand(*LAYERS))
    assert (found.values, found.split_share, found.quantized_share) == (1000, 0.5, None)
    records = [(each.tensor, each.shape, each.values, each.reason) for each in found.left_float]
    of_no_layer = "no backend quantizes the {} of a Linear"
    assert records == [
        ("a.bias", (5,), 5, "it was split, and no backend has quantized it yet"),
        ("b.weight", (300,), 300, of_no_layer.format("weight")),
        ("c.inner.weight", (191,), 191, "it is round"),
    ]
    found = coverage(TENSORS, {"b", "c.inner"}, by_hand(*LAYERS))
    assert (found.split_share, found.quantized_share) == (0.5, 0.491)
    assert [each.tensor for each in found.left_float] == ["a.weight", "a.bias"]
    assert {each.reason for each in found.left_float} == {"it was split, and the backend left its parts float"}
    found = coverage(TENSORS, ["a"], None)
    assert (found.split_share, found.quantized_share) == (0.0, 0.5)
    assert found.left_float[0].reason == of_no_layer.format("bias")


def test_a_model_without_values_has_no_shares():
    found = coverage([tensor("a.weight", 0)], ["a"], None)
    assert (found.values, found.split_share, found.quantized_share, found.left_float) == (0, 0.0, 0.0, [])
    assert coverage([tensor("a.weight", 1)], ["a"], None).quantized_share == 1.0


def test_what_a_backend_quantized_is_noted_where_the_float_model_is_known():
    manifest = by_hand(*LAYERS)
    note_quantized(manifest, ["b"])
    assert manifest.coverage is None
    manifest.coverage = coverage(TENSORS, None, manifest)
    read = Manifest.model_validate_json(manifest.model_dump_json())
    note_quantized(read, ["b"])
    assert read.coverage == manifest.coverage  # there are no tensors to tell it by
    assert read.coverage.quantized_share is None
    for quantized in (["b"], ["a", "b"]):  # and once more
        note_quantized(manifest, quantized)
        assert manifest.coverage == coverage(TENSORS, quantized, manifest)
    assert manifest.coverage.split_share == 0.5
    assert manifest.coverage != read.coverage
    assert manifest.coverage != manifest.coverage.model_dump()


def test_reasons_of_layers_that_stay_float_may_be_given_later():
    found = coverage(TENSORS, [], None)
    given = with_reasons(found, {"b": "it is blue", "c.inner": "it is red", "c": "w", "weight": "x", "": "y"})
    before, after = ({each.tensor: each.reason for each in one.left_float} for one in (found, given))
    assert after == {**before, "b.weight": "it is blue", "c.inner.weight": "it is red"}
    assert (given.values, given.split_share) == (found.values, found.split_share)
    assert before["b.weight"] != "it is blue"


def test_why_a_tensor_stays_float():
    assert why(tensor("a.weight", 9, is_embedding=True), {"a": "r"}).startswith("an embedding is looked up")
    assert why(tensor("a.weight", 9), {"a": "r"}) == "r"
    assert why(tensor("a.inner.bias", 9, "Conv2d"), {"a": "r"}) == "no backend quantizes the bias of a Conv2d"
    for name, shape, experts in (
        *(("a.b.w", (4, 2, 3), 4), ("a.b.w", (2, 1, 3), 2), ("a.b.w", (1, 4, 4), 0), ("a.b.w", (4, 2), 0)),
        *(("a.b.weight", (4, 2, 3), 0), ("weight", (4, 2, 3), 0)),
    ):
        found = why(FloatTensor(name, "a.b", "Experts", shape, 24, False), {"a.b": "r"})
        assert found.startswith(f"Experts keeps the weights of {experts} experts as one tensor") == bool(experts)
        assert (found == "r") != bool(experts)


def test_sentences_say_what_is_known():
    records = [FloatRecord(tensor="a.bias", shape=(2, 3), values=6, reason="r")]
    found = Coverage(values=10, split_share=0.25, quantized_share=0.5, left_float=records)
    lines = ["Of the model's values, 50.0% quantized and 25.0% split.", "a.bias [2, 3] stays float: r"]
    assert sentences(found) == lines
    assert sentences(Coverage(values=10, split_share=0.25)) == ["Of the model's values, 25.0% split."]
    row = {"model": "m", **found.model_dump(include={"split_share", "quantized_share", "left_float"})}
    assert sentences(coverage_of(row)) == lines
    assert coverage_of(row).values == 0


def test_positions_are_no_experts(models):
    named = {each.name: why(each, {}) for each in float_tensors(models.vit())}
    assert named["vit.embeddings.position_embeddings"] == (
        "no backend quantizes the position_embeddings of a ViTEmbeddings"
    )


def test_a_parametrized_convolution_has_no_experts():
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 8, 3)))
    found = coverage(float_tensors(model), (), None)
    assert len(found.left_float) > 1
    assert not any("experts" in each.reason for each in found.left_float)
