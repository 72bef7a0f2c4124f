"""`save_pretrained` of a split model with INC's weight-only layers, and `from_pretrained`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import InputError, SkeletonMismatchError

transformers = pytest.importorskip("transformers")
inc = pytest.importorskip("neural_compressor.torch.quantization")

from splitquant_inc.stored_layers import quantized_layers  # noqa: E402

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


@torch.no_grad()
def logits(model, *inputs):
    return model(*inputs).logits


@pytest.fixture
def split(plugins):
    def make(recipe, model=None, tokens=None, splitter="kmeans"):
        model = model or transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
        prepared = inc.prepare(model, SplitQuantPass(plugins=plugins, splitter=splitter) + recipe)
        if tokens is not None:
            prepared(tokens)
        return inc.convert(prepared)

    return make


RECIPES = {
    "rtn": lambda: inc.RTNConfig(bits=2, use_sym=False, group_size=-1),
    "rtn4": lambda: inc.RTNConfig(bits=4, use_sym=True, group_size=16),
    "hqq": lambda: inc.HQQConfig(bits=2, group_size=16, quant_zero=False),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("size", [None, "20KB"])
def test_identical_outputs_before_and_after_a_forward_pass(split, tokens, tmp_path, recipe, size):
    model = split(RECIPES[recipe]())
    model.save_pretrained(tmp_path / "fresh", **({"max_shard_size": size} if size else {}))
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "used")
    for folder in ("fresh", "used"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again, tokens), expected)
        assert quantized_layers(again).keys() == quantized_layers(model).keys()
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again"), tokens), expected)


def test_conv1d_comes_back(split, models, tokens, tmp_path):
    model = split(RECIPES["rtn"](), models.gpt2())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"in_features": 31}, SkeletonMismatchError, "is packed with 31 inputs"),
        ({"bits": 4}, SkeletonMismatchError, "was packed in another way"),
        ({"kind": "pickle"}, InputError, "config.json is damaged: layer model"),
    ],
)
def test_a_layer_that_config_json_describes_wrongly_is_an_error(split, tmp_path, change, error, problem):
    split(RECIPES["rtn"](), splitter="halve").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj.upper"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=problem):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("recipe", ["rtn", "rtn4"])
def test_the_zeros_of_disjoint_parts_are_not_on_disk(split, tmp_path, recipe):
    model = split(RECIPES[recipe]())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not [name for name in tensors if name.endswith("qweight")]
    layer = model.model.layers[0].mlp.up_proj
    name, bits = "model.layers.0.mlp.up_proj", layer.lower.bits
    assert tensors[f"{name}.codes"].nbytes * 8 == bits * layer.in_features * layer.out_features
    assert tensors[f"{name}.part_of"].nbytes == -(-layer.in_features * layer.out_features // 5)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj
    for part, other in zip(layer.parts(), again.parts(), strict=True):
        assert all(torch.equal(part.state_dict()[key], tensor) for key, tensor in other.state_dict().items())
