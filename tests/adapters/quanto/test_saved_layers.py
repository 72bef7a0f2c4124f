"""`save_pretrained` of a split model that quanto has quantized, and `from_pretrained`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.errors import ConfigError, InputError, SkeletonMismatchError

quanto = pytest.importorskip("optimum.quanto")
transformers = pytest.importorskip("transformers")

from splitquant_quanto import load  # noqa: E402
from splitquant_quanto.quantization import quantize_after  # noqa: E402

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


@torch.no_grad()
def logits(model, *inputs):
    return model(*inputs).logits


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(module, quanto.QModuleMixin)}


@pytest.fixture
def split(plugins):
    """Split, by the quickest splitter for the grid, unless told, and quantize."""
    return lambda model, weights="int2", method="rtn", **options: quantize_after(
        SplitQuantPass(plugins=plugins, **{"splitter": "residual", **options}), model, weights, method=method
    )


@pytest.mark.parametrize(
    ("name", "weights", "method"),
    [
        ("bert", "int2", "rtn"),
        ("bert", "int8", "rtn"),
        ("bert", "int4", "hqq"),
        ("gpt2", "int4", "rtn"),
        ("vit", "int2", "rtn"),
        ("resnet", "int8", "rtn"),
    ],
)
@pytest.mark.parametrize("size", [None, "30KB"])
def test_identical_outputs(split, models, images, tokens, tmp_path, name, weights, method, size):
    model = split(getattr(models, name)(), weights, method, untie_embeddings=name == "gpt2")
    model.save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = images if name in ("vit", "resnet") else tokens
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    assert quantized(again) == quantized(model) != set()


def test_a_recipe_given_to_from_pretrained_is_saved_and_comes_back(plugins, tokens, tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "float")
    recipe = SplitQuantPass(plugins=plugins) + transformers.QuantoConfig(weights="int2")
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "float", quantization_config=recipe)
    model.save_pretrained(tmp_path / "split")
    again = kind.from_pretrained(tmp_path / "split", device_map="cpu")
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), again.generate(tokens, **options))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again"), tokens), logits(model, tokens))


def test_a_quantized_head_of_a_tied_model_has_codes_of_its_own(split, tokens, tmp_path):
    model = split(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval())
    assert "lm_head" in quantized(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_bfloat16_comes_back_and_no_other_dtype(split, tokens, tmp_path):
    config = transformers.LlamaConfig(**LLAMA)
    model = split(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), "int4")
    model.save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    assert torch.equal(logits(kind.from_pretrained(tmp_path), tokens), logits(model, tokens))
    with pytest.raises(ConfigError, match=r"dtype=torch\.float16: this model was quantized in bfloat16"):
        kind.from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match="leaves layers on the disk"):
        kind.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "disk"})


def test_another_recipe_on_top_is_refused(split, models, plugins, tmp_path):
    split(models.bert()).save_pretrained(tmp_path)
    recipe = SplitQuantPass(plugins=plugins) + transformers.QuantoConfig(weights="int2")
    with pytest.raises(ValueError, match="quantized with SplitCheckpointConfig"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=recipe)


def test_quantized_but_not_frozen_is_refused(models, plugins, tmp_path):
    model = SplitQuantPass(plugins=plugins)(models.bert())
    quanto.quantize(model, weights=quanto.qint2)
    with pytest.raises(InputError, match="not frozen; call"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("classifier.upper.weight._scale"), r"classifier\.upper: weight\._scale is saved as None"),
        (
            lambda t: t.update({"classifier.upper.weight._scale": torch.zeros(3, 3)}),
            r"weight\._scale is saved as TensorSpec\(dtype=torch.float32, shape=\(3, 3\)\)",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("classifier.upper.")],
            r"no tensor of classifier\.upper",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(split, models, tmp_path, change, problem):
    split(models.bert()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkeletonMismatchError, match=problem):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_layer_that_config_json_describes_wrongly_is_an_error(split, models, tmp_path):
    split(models.bert()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["classifier.upper"]["weights"] = "qfloat8"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"classifier\.upper is damaged"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_manifest_that_lost_a_layer_is_an_error(split, models, tmp_path):
    model = split(models.bert())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    lost = config["quantization_config"]["manifest"]["layers"].pop()["name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SkeletonMismatchError, match=f"describes {lost}[.a-z]* as saved by quanto, and its manifest"):
        type(model).from_pretrained(tmp_path)


def test_the_adapters_own_folder_says_nothing_to_transformers(split, models, tmp_path):
    from splitquant_quanto import save

    model = split(models.bert())
    save(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert len(manifest_of(load(tmp_path)).split) == len(manifest_of(model).split)


def stored_bits(folder, model):
    """Bits per weight that the files hold of split layers, codes and scales."""
    tensors = load_file(folder / "model.safetensors")
    records = manifest_of(model).split
    prefixes = tuple(f"{record.name}." for record in records)
    own = [t for name, t in tensors.items() if name.startswith(prefixes) and not name.endswith((".bias", "put_scale"))]
    return 8 * sum(t.nbytes for t in own) / sum(torch.Size(record.shape).numel() for record in records)


@pytest.mark.parametrize(("weights", "bits"), [("int2", 2), ("int4", 4), ("int8", 8)])
def test_the_zeros_of_disjoint_parts_are_not_on_disk(split, models, tokens, tmp_path, weights, bits):
    options = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 64}
    model = split(models.bert(**options), weights, splitter="kmeans")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    scales = 3 * (1 if bits == 8 else 2) * 32 / 64 + 0.5  # at most, and the guards
    assert bits + 1.6 <= stored_bits(tmp_path, model) <= bits + 1.6 + scales
    for (name, part), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(part, other), name


def test_overlapping_parts_are_stored_as_they_are(split, models, tokens, tmp_path):
    model = split(models.bert(), splitter="halve")
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("part_of")]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("classifier.part_of"), r"no tensor classifier\.part_of"),
        (lambda t: t.update({"classifier.part_of": t["classifier.part_of"][1:]}), "cannot be taken apart"),
        (lambda t: t["classifier.part_of"].fill_(255), "the byte 255 holds no 5 digits"),
    ],
)
def test_joined_codes_that_do_not_fit_are_an_error(split, models, tmp_path, change, problem):
    split(models.bert(), splitter="kmeans").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkeletonMismatchError, match=problem):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
