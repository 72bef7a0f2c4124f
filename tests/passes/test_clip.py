"""ClipPass: what it does to a model, what goes before and behind it, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import ClipPass, DecoupleQPass, Manifest, SplitQuantPass, UniformGrid, manifest_of
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError, SplitFailedError
from splitquant_plugins.passes import clip
from splitquant_plugins.passes.rebuild import apply_manifest
from splitquant_plugins.solvers.clipping import clip_to_grid

GRID = UniformGrid(2)
BATCHES = [torch.randn(8, 12)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(layer.weight.abs() ** 2 * 100)
    return model.eval()


def rounded(model: nn.Module, grid: UniformGrid = GRID) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid.quantize_dequantize(layer.weight.data)
    return model


def test_each_layer_is_clipped_and_recorded():
    model = net()
    before = copy.deepcopy(model)
    assert ClipPass().apply(model, grid=GRID) is model
    for name in ("0", "2"):
        old, new = before.get_submodule(name), model.get_submodule(name)
        found = clip_to_grid(old.weight.detach(), GRID)
        assert torch.equal(new.weight, found.weight)
        assert torch.equal(new.bias, old.bias)
        assert isinstance(new.weight, nn.Parameter)
        (record,) = [each for each in manifest_of(model).layers if each.name == name]
        assert record.action == "kept"
        assert record.clipping.error_before == pytest.approx(float(found.error_before.sum()))
        assert record.clipping.error_after == pytest.approx(float(found.error_after.sum()))
        assert record.clipping.error_after < record.clipping.error_before
        assert record.clipping.groups == len(new.weight) >= record.clipping.clipped_groups > 0
    (note,) = manifest_of(model).notes
    assert note == "ClipPass clipped the weights of 2 layers, which are no longer those of the float model"
    assert manifest_of(model).seconds > 0


def test_rounded_outputs_come_nearer():
    model, x = net(), torch.randn(256, 12)
    wanted = model(x)
    plain = (rounded(copy.deepcopy(model))(x) - wanted).square().mean()
    clipped = (rounded(ClipPass().apply(model, grid=GRID))(x) - wanted).square().mean()
    assert clipped < 0.8 * plain


def test_a_manifest_comes_back_and_fits_the_model(tmp_path):
    model = ClipPass().apply(net(), grid=GRID)
    manifest_of(model).save(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert manifest == manifest_of(model)
    empty = apply_manifest(net(), manifest)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(BATCHES[0]), model(BATCHES[0]))


def test_patterns_and_what_the_recipe_ignores_choose_layers():
    for options, ignore in (({"include": "0"}, ()), ({"exclude": ("2",)}, ()), ({}, ("2",))):
        model, before = net(), net()
        ClipPass(**options).apply(model, grid=GRID, ignore=ignore)
        assert not torch.equal(model[0].weight, before[0].weight)
        assert torch.equal(model[2].weight, before[2].weight)
        (record,) = [each for each in manifest_of(model).layers if each.name == "2"]
        assert record.clipping is None
        assert record.reason != "it was not split: there was no SplitQuantPass"


def test_layers_without_a_grid_stay():
    model, before = net(), net()
    ClipPass().apply(model, grid={"0": GRID}.get)
    assert torch.equal(model[2].weight, before[2].weight)
    (record,) = [each for each in manifest_of(model).layers if each.name == "2"]
    assert record.clipping is None
    assert record.reason == "the recipe has no linear grid for it that is known beforehand"


def test_whole_layers_are_clipped_for_the_grid_of_whole_layers():
    class Parts(UniformGrid):
        whole = UniformGrid(2, "symmetric")

    model = ClipPass().apply(net(), grid=Parts(2))
    assert torch.equal(model[0].weight, clip_to_grid(net()[0].weight.detach(), Parts.whole).weight)


def test_weights_that_gain_nothing_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data = torch.ones(3, 4)
    weight = model[0].weight
    ClipPass().apply(model, grid=GRID)
    assert model[0].weight is weight
    assert manifest_of(model).layers[0].clipping.clipped_groups == 0
    assert manifest_of(model).notes[0].startswith("ClipPass clipped the weights of 0 layers")


def test_layers_that_share_a_weight_go_on_sharing_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    ClipPass().apply(model, grid=GRID)
    assert model[1].weight is model[0].weight
    assert model[0].weight.requires_grad


def test_convolutions_and_transposed_layers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), utils.Conv1D(6, 5)])
    before = copy.deepcopy(model)
    ClipPass().apply(model, grid=GRID)
    assert torch.equal(model[0].weight, clip_to_grid(before[0].weight.detach(), GRID).weight)
    assert torch.equal(model[1].weight, clip_to_grid(before[1].weight.detach().t(), GRID).weight.t())
    assert model[1].weight.is_contiguous()


def test_frozen_weights_stay_frozen_and_inference_tensors_are_taken():
    model = net().requires_grad_(False)
    assert not ClipPass().apply(model, grid=GRID)[0].weight.requires_grad
    with torch.inference_mode():
        made = net()
        ClipPass().apply(made, grid=GRID)
    assert torch.equal(made[0].weight, model[0].weight)


def test_behind_a_budget_the_layers_left_whole_are_clipped():
    model = net()
    first = SplitQuantPass(k=2, include="0", split_bias=False) + ClipPass()
    first.apply(model, grid=GRID)
    assert [record.name for record in manifest_of(model).split] == ["0"]
    assert torch.equal(model[2].weight, clip_to_grid(net()[2].weight.detach(), GRID).weight)
    assert torch.allclose(model[0].weight, net()[0].weight)
    clippings = {record.name: record.clipping is not None for record in manifest_of(model).layers}
    assert clippings["2"]
    assert not clippings["0"]


def test_on_an_error_the_model_is_as_it_was(monkeypatch):
    model, before = net(), net()
    parameters = list(model.parameters())
    calls = []

    def fails(weight, grid):
        calls.append(weight)
        if len(calls) > 1:
            raise RuntimeError("no more")
        return clip_to_grid(weight, grid)

    monkeypatch.setattr(clip, "clip_to_grid", fails)
    with pytest.raises(RuntimeError, match="no more"):
        ClipPass().apply(model, grid=GRID)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model[0].weight, before[0].weight)
    assert not hasattr(model, "splitquant_manifest")


def test_what_is_refused_says_what_to_do():
    with pytest.raises(ConfigError, match=r"ClipPass has no option 'bits'; it takes: exclude, include"):
        ClipPass(bits=2)
    with pytest.raises(ConfigError, match="ranges are chosen last"):
        ClipPass() + SplitQuantPass()
    with pytest.raises(ConfigError, match="chooses its own ranges"):
        SplitQuantPass() + ClipPass() + DecoupleQPass(calibration=BATCHES)
    with pytest.raises(ConfigError, match="values are chosen last"):
        SplitQuantPass() + DecoupleQPass(calibration=BATCHES) + ClipPass()
    with pytest.raises(ConfigError, match=r"ClipPass\(\.\.\.\) \+ recipe"):
        ClipPass()(net())
    with pytest.raises(ConfigError, match="ignore='0'"):
        ClipPass().apply(net(), grid=GRID, ignore="0")
    with pytest.raises(ConfigError, match="finds no layer to clip in Sequential"):
        ClipPass(exclude="*").apply(net(), grid=GRID)
    with pytest.raises(ConfigError, match="include pattern 'x' matches no"):
        ClipPass(include="x").apply(net(), grid=GRID)
    with pytest.raises(InputError, match="not a list"):
        ClipPass().apply([], grid=GRID)
    with pytest.raises(InputError, match=r"ClipPass\(\.\.\.\) \+ quantizer"):
        ClipPass().apply(torch.fx.symbolic_trace(net()), grid=GRID)
    with pytest.raises(AlreadySplitError, match="ClipPass was applied"):
        ClipPass().apply(ClipPass().apply(net(), grid=GRID), grid=GRID)
    solved = DecoupleQPass(calibration=BATCHES, rounds=0, sweeps=0).apply(net(), grid=GRID)
    with pytest.raises(AlreadySplitError, match="DecoupleQPass chose the values"):
        ClipPass().apply(solved, grid=GRID)
    wrong = net()
    wrong[2].weight.data[0, 0] = torch.nan
    with pytest.raises(SplitFailedError, match=r"2\.weight has 1 NaN"):
        ClipPass().apply(wrong, grid=GRID)


def test_a_longer_sequence_is_flat():
    one = SplitQuantPass(k=2) + ClipPass(include="2")
    assert [type(each).__name__ for each in one.passes] == ["SplitQuantPass", "ClipPass"]
    assert repr(one) == "SplitQuantPass(k=2) + ClipPass(include=('2',))"
