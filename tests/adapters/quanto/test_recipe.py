"""`SplitQuantPass() + QuantoConfig(...)` in `from_pretrained`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass, manifest_of
from splitquant_plugins.errors import ConfigError, MissingExtraError
from splitquant_plugins.modules import SplitModule

quanto = pytest.importorskip("optimum.quanto")
transformers = pytest.importorskip("transformers")

from splitquant_quanto.grid import QuantoGrid  # noqa: E402


@pytest.fixture
def saved(models, tmp_path):
    """A folder with a small BERT."""
    models.bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(folder, recipe=None, **options):
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, quantization_config=recipe, **options).eval()


def quantized_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, quanto.QModuleMixin)]


@pytest.fixture
def recipe(plugins):
    """The maker of recipes with a pass, by the quickest splitter for the grid, unless told."""

    def make(weights="int2", modules_to_not_convert=None, **options):
        options = {"splitter": "residual", **options}
        config = transformers.QuantoConfig(weights=weights, modules_to_not_convert=modules_to_not_convert)
        return SplitQuantPass(plugins=plugins, **options) + config

    return make


@torch.no_grad()
@pytest.mark.parametrize(("weights", "splitter"), [("int2", "grid"), ("int4", "residual"), ("int8", "auto")])
def test_from_pretrained_splits_then_quantizes(saved, recipe, plugins, tokens, weights, splitter):
    model = load(saved, recipe(weights, splitter=splitter))
    manifest = manifest_of(model)
    assert len(manifest.split) == 14
    assert len(quantized_layers(model)) == 3 * 14
    float_model = load(saved)
    grid = QuantoGrid(int(weights[3:]))
    plain = SplitQuantPass(plugins=plugins, splitter=splitter).apply(copy.deepcopy(float_model), grid=grid)
    for record in manifest.split:
        for part in record.parts:
            name = f"{record.name}.{part}"
            held = model.get_submodule(name).weight
            assert isinstance(held, quanto.QTensor)
            assert torch.equal(held.dequantize(), grid.quantize_dequantize(plain.get_submodule(name).weight))
    if weights == "int8":
        assert torch.allclose(model(tokens).logits, float_model(tokens).logits, atol=0.02)


def test_the_recipe_is_of_the_same_kind(recipe):
    made = recipe("int4", ["classifier"])
    assert isinstance(made, transformers.QuantoConfig)
    assert (made.weights, made.modules_to_not_convert) == ("int4", ["classifier"])
    assert json.loads(made.to_json_string(use_diff=False))["first"]["pass"] == "SplitQuantPass"


def test_attaching_leaves_the_users_recipe_alone(plugins):
    config = transformers.QuantoConfig(weights="int2")
    before = copy.deepcopy(config.to_dict())
    SplitQuantPass(plugins=plugins) + config
    assert config.to_dict() == before
    assert type(config) is transformers.QuantoConfig


@pytest.mark.parametrize(
    "patterns", [["classifier"], ["attention"], ["bert.encoder.layer.0"], ["pooler", "layer.1"], ["dense"]]
)
def test_modules_to_not_convert_keeps_its_meaning(saved, recipe, patterns):
    stock = load(saved, transformers.QuantoConfig(weights="int4", modules_to_not_convert=patterns))
    model = load(saved, recipe("int4", patterns))
    ours = {name.rpartition(".")[0] for name in quantized_layers(model)}
    assert ours == set(quantized_layers(stock))
    for record in manifest_of(model).kept:
        if record.reason == "the recipe does not quantize it":
            assert type(model.get_submodule(record.name)) is nn.Linear
    assert {record.name for record in manifest_of(model).split} == ours


def test_layers_the_pass_leaves_whole_are_quantized(saved, recipe):
    model = load(saved, recipe("int4", exclude="classifier"))
    assert "classifier" in quantized_layers(model)
    assert not isinstance(model.classifier, SplitModule)


@torch.no_grad()
def test_bfloat16(saved, recipe, tokens):
    model = load(saved, recipe("int4"), dtype=torch.bfloat16)
    assert {record.dtype for record in manifest_of(model).split} == {"bfloat16"}
    output = model(tokens).logits
    assert output.dtype == torch.bfloat16
    assert bool(torch.isfinite(output).all())
    for module in model.modules():
        if isinstance(module, SplitModule):
            assert all(part.weight.dequantize().dtype == torch.bfloat16 for part in module.parts())


def test_a_causal_model_keeps_its_tied_head(models, recipe, tokens, tmp_path):
    models.gpt2().save_pretrained(tmp_path / "gpt2")
    stock = load(tmp_path / "gpt2")
    # GPT-2 is made of Conv1D, which transformers' quanto does not quantize, and its head is tied.
    assert stock.lm_head.weight is stock.transformer.wte.weight
    transformers_llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    transformers.LlamaForCausalLM(transformers_llama).save_pretrained(tmp_path / "llama")
    stock = load(tmp_path / "llama", transformers.QuantoConfig(weights="int4"))
    model = load(tmp_path / "llama", recipe("int4"))
    assert {name.rpartition(".")[0] for name in quantized_layers(model)} == set(quantized_layers(stock))
    assert type(model.lm_head) is nn.Linear
    assert bool(torch.isfinite(model(tokens).logits).all())


@pytest.mark.parametrize(
    ("options", "config", "problem"),
    [
        ({"activations": True}, {}, "activations=True: the quanto adapter quantizes weights only"),
        ({}, {"activations": "int8"}, r"activations='int8'\): the quanto adapter is for weights only"),
        ({}, {"weights": "float8"}, "a split is for int2, int4, int8"),
    ],
)
def test_what_the_adapter_refuses(plugins, options, config, problem):
    recipe = transformers.QuantoConfig(**{"weights": "int2", **config})
    with pytest.raises(ConfigError, match=problem):
        SplitQuantPass(plugins=plugins, **options) + recipe


def test_a_second_pass_is_refused(plugins, recipe):
    with pytest.raises(ConfigError, match="attached already"):
        SplitQuantPass(plugins=plugins) + recipe()


def test_a_sequence_of_passes_with_activations_is_refused(plugins):
    one = SplitQuantPass(plugins=plugins) + SplitQuantPass(plugins=plugins, activations=True)
    with pytest.raises(ConfigError, match="activations=True"):
        one + transformers.QuantoConfig(weights="int2")


def test_a_missing_extra_names_the_extra(plugins, monkeypatch):
    from importlib import metadata

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("splitquant_plugins.backends.metadata.version", version)
    with pytest.raises(MissingExtraError, match=r'pip install "splitquant-plugins\[quanto\]"'):
        SplitQuantPass(plugins=plugins) + transformers.QuantoConfig(weights="int2")


@torch.no_grad()
def test_values_chosen_on_the_parts_reach_quanto(saved, plugins, tokens):
    batches = [{"input_ids": torch.randint(3, 99, (8, 12))} for _ in range(4)]
    solved = DecoupleQPass(calibration=batches, plugins=plugins, rounds=1, starts=(1.0,))
    recipe = SplitQuantPass(plugins=plugins, k=2) + solved + transformers.QuantoConfig(weights="int2")
    model = load(saved, recipe)
    manifest = manifest_of(model)
    assert len(manifest.split) == len(manifest.solved) == 14
    assert len(quantized_layers(model)) == 2 * 14
    plain = load(saved, transformers.QuantoConfig(weights="int2"))
    expected = load(saved)(tokens).logits
    error = (model(tokens).logits - expected).norm() / expected.norm()
    assert error < 0.2
    assert error < (plain(tokens).logits - expected).norm() / expected.norm()
