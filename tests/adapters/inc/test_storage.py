"""Saving and loading, with identical outputs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from neural_compressor.torch.quantization import GPTQConfig, HQQConfig, RTNConfig, quantize
from neural_compressor.torch.quantization import load as inc_load
from safetensors.torch import load_file, save_file
from splitquant_inc import load, save
from splitquant_inc.packing import rtn_layer
from splitquant_inc.storage import refuse_misfit, state_of
from torch import nn

from splitquant_plugins.errors import AlreadySplitError, InputError, SkeletonMismatchError
from splitquant_plugins.manifest import FILE_NAME, Manifest, manifest_of


def calibrate(model):
    model(torch.randint(0, 40, (4, 12)))


RECIPES = {
    "rtn2": lambda: RTNConfig(use_layer_wise=False, bits=2, use_sym=False, group_size=-1),
    "rtn4": lambda: RTNConfig(use_layer_wise=False, bits=4, use_sym=False, group_size=8).set_local(
        "head", RTNConfig(bits=8)
    ),
    "rtn8": lambda: RTNConfig(use_layer_wise=False, bits=8),
    "nf4": lambda: RTNConfig(use_layer_wise=False, dtype="nf4"),
    "gptq": lambda: GPTQConfig(bits=4, use_sym=False, group_size=8),
    "gptq act_order": lambda: GPTQConfig(bits=4, use_sym=False, group_size=8, act_order=True),
    "hqq": lambda: HQQConfig(bits=2, group_size=16),
    "hqq scales": lambda: HQQConfig(bits=4, group_size=16, quant_scale=True, scale_quant_group_size=8),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(("split", "after_forward"), [(True, True), (True, False), (False, True)])
def test_saved_and_loaded_outputs_are_identical(net, ids, split_pass, tmp_path, kind, split, after_forward):
    recipe = RECIPES[kind]()
    model = quantize(net(), split_pass() + recipe if split else recipe, run_fn=calibrate)
    if after_forward:
        expected = model(ids)
        save(model, tmp_path / "saved")
    else:
        save(model, tmp_path / "saved")
        expected = model(ids)
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    fresh = net()
    torch.manual_seed(99)
    for parameter in fresh.parameters():
        parameter.normal_()
    loaded = load(tmp_path / "saved", fresh)
    assert torch.equal(loaded(ids), expected)
    assert not loaded.training
    if split:
        assert manifest_of(loaded).split == manifest_of(model).split


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rtn2", "hqq"])
def test_a_transformers_model_in_a_fresh_process(models, tokens, split_pass, tmp_path, python_path, kind):
    model = quantize(models.bert(tie_word_embeddings=False), split_pass() + RECIPES[kind]())
    save(model, tmp_path)
    script = f"""
import torch, warnings; warnings.simplefilter("ignore")
import transformers
from splitquant_inc import load
model = load({str(tmp_path)!r})
with torch.no_grad(): torch.save(model(torch.tensor({tokens.tolist()})).logits, {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", script], env=python_path(), check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out"), model(tokens).logits)


def test_loading_without_the_skeleton_is_an_error_and_inc_says_nothing(net, split_pass, tmp_path, quantized):
    model = quantize(net(), split_pass() + RECIPES["rtn2"]())
    model.save(str(tmp_path / "by_inc"))
    silent = inc_load(str(tmp_path / "by_inc"), original_model=net())
    assert not quantized(silent), "INC loads split layers now, or says that it cannot"
    with pytest.raises(InputError, match="splitquant_inc"):
        load(tmp_path / "by_inc", net())
    save(model, tmp_path / "ours")
    (tmp_path / "ours" / FILE_NAME).unlink()
    with pytest.raises(SkeletonMismatchError, match=FILE_NAME):
        load(tmp_path / "ours", net())


def test_models_that_do_not_fit_are_errors(net, split_pass, tmp_path):
    save(quantize(net(), split_pass() + RECIPES["rtn2"]()), tmp_path)
    with pytest.raises(AlreadySplitError):
        load(tmp_path, split_pass()(net()))
    with pytest.raises(SkeletonMismatchError, match="shape"):
        load(tmp_path, type(net())("", width=8))
    other = net()
    other.extra = torch.nn.Linear(2, 2)
    with pytest.raises(SkeletonMismatchError, match="extra"):
        load(tmp_path, other)
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["rtn2", "hqq"])
def test_damaged_files_are_errors(net, split_pass, tmp_path, kind):
    save(quantize(net(), split_pass() + RECIPES[kind]()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [name for name in tensors if name.startswith("head.upper")]:
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        save_file(rest, tmp_path / "model.safetensors")
        with pytest.raises(SkeletonMismatchError):
            load(tmp_path, net())
    save_file(tensors, tmp_path / "model.safetensors")
    storage = json.loads((tmp_path / "splitquant_inc.json").read_text())
    for change in ({"format": 9}, {"layers": {"head.upper": {"kind": "other"}}}, {"surprise": 1}):
        (tmp_path / "splitquant_inc.json").write_text(json.dumps({**storage, **change}))
        with pytest.raises(InputError, match="damaged"):
            load(tmp_path, net())
    unknown = copy.deepcopy(storage)
    unknown["layers"]["nowhere"] = storage["layers"]["head.upper"]
    (tmp_path / "splitquant_inc.json").write_text(json.dumps(unknown))
    with pytest.raises(SkeletonMismatchError, match="nowhere"):
        load(tmp_path, net())


def test_a_float_model_is_not_saved(net, tmp_path):
    with pytest.raises(InputError, match="call convert first"):
        save(net(), tmp_path)


def test_saving_an_unsplit_model_leaves_no_stale_manifest(net, ids, split_pass, tmp_path):
    save(quantize(net(), split_pass() + RECIPES["rtn4"](), run_fn=calibrate), tmp_path)
    assert (tmp_path / FILE_NAME).is_file()
    plain = quantize(net(), RECIPES["rtn4"](), run_fn=calibrate)
    save(plain, tmp_path)
    assert not (tmp_path / FILE_NAME).exists()
    assert torch.equal(load(tmp_path, net())(ids), plain(ids))


def test_an_exported_graph_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"an exported W8A8 graph .*torch\.quantization\.load"):
        save(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def head_float(kind):
    return RECIPES[kind]().set_local("head.*", type(RECIPES[kind]())(dtype="fp32"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rtn2", "hqq"])
def test_what_stays_float_and_what_is_tied_comes_back(net, ids, split_pass, tmp_path, kind):
    def make():
        model = net()
        model.layers[1].up.bias = model.layers[0].up.bias
        model.head_2 = nn.Linear(16, 8)
        model.head_2.bias = model.head.bias
        return model

    model = quantize(make(), split_pass(exclude=["head*"]) + head_float(kind))
    folder = tmp_path / "new" / "below"
    save(model, folder)
    save(model, folder)
    said = json.loads((folder / "splitquant_inc.json").read_text())
    assert said["same_as"]["head_2.bias"] == "head.bias"
    assert all(name.startswith("layers.") for name in said["layers"])
    coverage = Manifest.load(folder).coverage
    left = {record.tensor for record in coverage.left_float if record.tensor.endswith("weight")}
    assert left == {"embedding.weight", "head.weight", "head_2.weight"}
    assert round(coverage.quantized_share * coverage.values) == sum(
        layer.weight.numel() for block in net().layers for layer in (block.up, block.down)
    )
    expected = model(ids)
    back = load(str(folder), make().train())
    assert torch.equal(back(ids), expected)
    assert not any(module.training for module in back.modules())
    state, layers = state_of(back)
    assert layers.keys() == said["layers"].keys()
    kept = load_file(folder / "model.safetensors")
    assert state.keys() == kept.keys() | said["same_as"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_a_misfit_is_told_on_one_line(net, split_pass, tmp_path):
    save(quantize(net(), split_pass() + RECIPES["rtn2"]()), tmp_path)
    other = net()
    other.extra, other.more = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(SkeletonMismatchError) as caught:
        load(tmp_path, other)
    assert str(caught.value).startswith(f"{tmp_path} does not fit Net: Error(s) in loading state_dict for Net: Missing")
    assert "\n" not in str(caught.value)
    assert "  " not in str(caught.value)


def test_a_layer_has_the_sizes_of_the_packed_one():
    from transformers.pytorch_utils import Conv1D

    packed = rtn_layer(16, 8, 4, None)
    refuse_misfit(nn.Linear(16, 8), "up", packed, "here")
    refuse_misfit(Conv1D(8, 16), "up", packed, "here")
    for other, sizes in (
        (nn.Linear(16, 4), "Linear with 16 and 4"),
        (nn.Linear(4, 8), "Linear with 4 and 8"),
        (Conv1D(16, 8), "Conv1D with 8 and 16"),
        (nn.ReLU(), "ReLU with None and None"),
    ):
        with pytest.raises(SkeletonMismatchError) as caught:
            refuse_misfit(other, "up", packed, "here")
        assert str(caught.value) == f"here: up is packed with 16 inputs and 8 outputs, and is a {sizes} here"


def test_a_folder_of_save_pretrained_is_left_to_transformers(net, split_pass, tmp_path, monkeypatch):
    save(quantize(net(), split_pass() + RECIPES["rtn2"]()), tmp_path)
    monkeypatch.setattr("splitquant_inc.storage.is_pretrained", lambda folder: folder == tmp_path)
    monkeypatch.setattr("splitquant_inc.storage.load_model", lambda folder: [folder])
    assert load(tmp_path) == [str(tmp_path)]
    assert isinstance(load(tmp_path, net()), type(net()))
