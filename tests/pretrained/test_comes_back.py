"""`save_pretrained` of a float split model, and `from_pretrained`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.checkpoints.pretrained_config import METHOD
from splitquant_plugins.errors import InputError, SkeletonMismatchError, SplitQuantError
from splitquant_plugins.modules import SplitModule

transformers = pytest.importorskip("transformers")

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **options})).eval()


@torch.no_grad()
def logits(model, *inputs):
    return model(*inputs).logits


def split_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, SplitModule)}


@pytest.fixture
def split(plugins):
    return lambda model, **options: SplitQuantPass(plugins=plugins, splitter="kmeans", **options)(model)


@pytest.fixture
def folder(split, tmp_path):
    """A split Llama that was saved, with its logits."""
    torch.manual_seed(1)
    split(llama()).save_pretrained(tmp_path / "split")
    return tmp_path / "split"


def edited(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "resnet"])
@pytest.mark.parametrize("size", [None, "20KB"])
def test_identical_outputs_from_one_file_and_from_shards(split, models, images, tokens, tmp_path, name, size):
    model = split(getattr(models, name)())
    model.save_pretrained(tmp_path, **({"max_shard_size": size} if size else {}))
    assert bool(list(tmp_path.glob("model-0*.safetensors"))) == (size is not None)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = {"vit": (images,), "resnet": (images,), "t5": (tokens, None, tokens)}.get(name, (tokens,))
    assert torch.equal(logits(model, *inputs), logits(again, *inputs))
    assert split_layers(again) == split_layers(model) != set()
    assert not again.training
    assert [r.name for r in manifest_of(again).split] == [r.name for r in manifest_of(model).split]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("untie", [True, False])
def test_tied_heads_stay_tied_unless_they_were_split(split, tokens, tmp_path, tied, untie):
    model = split(llama(tie_word_embeddings=tied), untie_embeddings=untie)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    assert ("lm_head" in split_layers(again)) == (untie or not tied)
    if tied and not untie:
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_what_came_back_generates_and_is_saved_again(folder, tokens, tmp_path):
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, device_map="cpu")
    model.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), again.generate(tokens, **options))
    assert (folder / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_another_dtype_is_that_of_the_parts_too(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {record.dtype for record in manifest_of(model).split} == {"bfloat16"}
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(folder), tokens)
    assert torch.allclose(logits(model, tokens).float(), expected, atol=0.05)


def test_a_bfloat16_model_comes_back_in_bfloat16(split, tokens, tmp_path):
    config = transformers.LlamaConfig(**LLAMA)
    model = split(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(again, tokens).dtype == torch.bfloat16
    assert torch.equal(logits(model, tokens), logits(again, tokens))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_after_the_split_comes_back(split, tokens, tmp_path, dtype):
    model = split(llama()).to(dtype)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_model_that_lost_a_split_layer_is_not_saved(split, tmp_path):
    model = split(llama())
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48)
    with pytest.raises(SkeletonMismatchError, match=r"layers\.0\.mlp\.up_proj was split and is a Linear now"):
        model.save_pretrained(tmp_path)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(SkeletonMismatchError, match="was split and is"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_other_tensors_than_the_models_are_refused_and_its_own_are_written(split, tokens, tmp_path, tied):
    model = split(llama(tie_word_embeddings=tied))
    name = "model.layers.0.mlp.up_proj.upper.weight"
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for other in (
        own | {name: 2 * own[name]},
        {**own, "more": own[name]},
        {key: own[key] for key in own if key != name},
    ):
        with pytest.raises(InputError, match=r"state_dict is not what the model holds .*load_state_dict"):
            model.save_pretrained(tmp_path / "other", state_dict=other)
    model.save_pretrained(tmp_path / "own", state_dict=own)
    own.pop("lm_head.weight", None)  # of tied weights one is enough
    model.save_pretrained(tmp_path / "own", state_dict=own)
    came_back = type(model).from_pretrained(tmp_path / "own")
    assert torch.equal(logits(came_back, tokens), logits(model, tokens))


def test_what_casting_did_to_computed_buffers_comes_back(split, tokens, tmp_path):
    model = split(llama().bfloat16())  # rotary frequencies too, which from_pretrained leaves in float32
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_base_of_a_saved_model_and_a_head_on_a_saved_base(folder, split, tokens, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = whole.model(tokens).last_hidden_state
        assert torch.equal(base(tokens).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        assert torch.equal(again.model(tokens).last_hidden_state, expected)
    assert {name.removeprefix("model.") for name in split_layers(again)} == split_layers(base)


def test_layers_of_one_weight_share_their_parts_again(split, tokens, tmp_path):
    def shared(model):
        first, second = model.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        return model

    model = split(shared(llama()))
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    first, second = again.model.layers
    assert first.mlp.up_proj.lower.weight is second.mlp.up_proj.lower.weight


def test_a_copy_is_saved_for_itself(split, tokens, tmp_path):
    model = split(llama())
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.up_proj.lower.weight.data.zero_()
    twin.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(twin, tokens))
    assert not torch.equal(logits(again, tokens), logits(model, tokens))


def test_what_stayed_float_says_nothing_of_a_split(models, tmp_path):
    models.bert().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


CODE = """
import sys, transformers
from transformers import AutoModelForCausalLM as LM
try:
    LM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", "ignore_mismatched_sizes" in str(error))
import splitquant_plugins
print("loaded", type(LM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)
"""


def test_without_the_import_transformers_refuses_and_with_it_after_transformers_it_loads(folder, python_path):
    run = [sys.executable, "-W", "ignore", "-c", CODE, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, env=python_path(), check=True)
    assert done.stdout.split() == ["refused", "True", "loaded", "SplitLinear"]


def test_the_import_before_transformers_imports_neither_it_nor_torch_and_registers_later(python_path):
    code = (
        "import sys, splitquant_plugins; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "import transformers.quantizers.auto as auto, inspect\n"
        f"assert auto.AUTO_QUANTIZER_MAPPING[{METHOD!r}].__name__ == 'SplitCheckpointQuantizer'\n"
        "assert type(auto.__loader__).__name__ == 'SourceFileLoader' and inspect.getsource(auto)\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('splitquant')]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=python_path(), check=True, capture_output=True)


def test_a_missing_tensor_is_an_error_and_never_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.middle.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkeletonMismatchError, match=r"layers\.1\.mlp\.up_proj\.middle\.weight is no such tensor"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.middle.weight"] = torch.zeros(48, 31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkeletonMismatchError, match=r"is \(48, 31\) there, and \(48, 32\)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "not of this version of splitquant_plugins: format 2"),
        ({"rotations": []}, "not of this version of splitquant_plugins: rotations"),
        ({"manifest": {"layers": 1}}, "manifest is damaged or of another version: config"),
        ({"manifest": None}, "manifest is damaged"),
        ({"layers": {"lm_head": {}}}, "layers without a backend"),
        ({"backend": "quanto"}, "a backend without any"),
        ({"layers": [1]}, "no object of objects"),
        ({"buffers": {"model.rotary_emb.inv_freq": "Tensor"}}, "buffers: a dtype is none of"),
    ],
)
def test_a_damaged_description_is_an_error(folder, changes, problem):
    edited(folder, **changes)
    with pytest.raises(InputError, match=problem):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_that_nobody_knows_how_to_save_is_an_error(split, tmp_path):
    model = split(llama())
    layer = model.model.layers[0].mlp.up_proj
    layer.lower.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"mlp\.up_proj\.lower, a part of .*no backend of splitquant says how to save"):
        model.save_pretrained(tmp_path)


def test_a_harness_that_knows_nothing_of_splits_loads_one_around_the_import(folder, tmp_path, python_path):
    """As docs/transformers.md has it for commands of others: they are run as modules, after the import."""
    code = "import sys, transformers as t; print(type(t.AutoModelForCausalLM.from_pretrained(sys.argv[2]).lm_head))\n"
    (tmp_path / "a_harness").mkdir()
    (tmp_path / "a_harness" / "__main__.py").write_text(code)
    start = "import splitquant_plugins, runpy; runpy.run_module('a_harness', run_name='__main__')"
    run = [sys.executable, "-W", "ignore", "-c", start, "--model", str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, env=python_path(tmp_path), check=True)
    assert "SplitLinear" in done.stdout


def test_mutants_of_the_description_are_errors_of_ours_or_load_the_same(folder, tokens, mutations, count_cases):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(folder), tokens)
    described = config["quantization_config"]
    described["manifest"]["layers"] = described["manifest"]["layers"][:2] + described["manifest"]["layers"][-1:]
    count = refused = unguarded = 0
    for text in mutations(json.dumps(described), most=60):
        try:
            mutant = json.loads(text)
        except ValueError:
            continue
        if not isinstance(mutant, dict) or mutant.get("quant_method") != METHOD:
            continue  # no longer ours
        path.write_text(json.dumps({**config, "quantization_config": mutant}))
        count += 1
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        except (SplitQuantError, RuntimeError) as error:  # RuntimeError: a layer that the manifest does not name
            refused += 1
            unguarded += not isinstance(error, SplitQuantError) and "ignore_mismatched_sizes" not in str(error)
        else:
            assert torch.equal(logits(loaded, tokens), expected)
    count_cases("mutants of quantization_config", count, f"{refused} refused")
    assert not unguarded
    assert refused > count / 2
