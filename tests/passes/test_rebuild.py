"""Rebuilding the split skeleton from a manifest, and loading weights into it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, apply_manifest, manifest_of
from splitquant_plugins.errors import AlreadySplitError, SkeletonMismatchError
from splitquant_plugins.modules import SplitModule


def rebuilt(model, fresh, plugins=None):
    skeleton = apply_manifest(fresh, manifest_of(model), plugins)
    skeleton.load_state_dict(model.state_dict())  # strict: every tensor has its place
    return skeleton.eval()


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("fresh_is_training", [False, True])
@pytest.mark.parametrize("options", [{}, {"activations": True}, {"fold_batchnorm": False}, {"exclude": "grouped"}])
def test_a_state_dict_goes_around(models, images, k, options, fresh_is_training):
    model = SplitQuantPass(k=k, **options)(models.conv())
    fresh = models.conv().train(fresh_is_training)
    skeleton = apply_manifest(fresh, manifest_of(model))
    assert skeleton.training == fresh_is_training
    assert skeleton.stem.training == fresh_is_training
    skeleton.load_state_dict(model.state_dict())
    assert torch.equal(skeleton.eval()(images), model(images))
    assert [type(m) for m in skeleton.modules()] == [type(m) for m in model.modules()]
    assert manifest_of(skeleton) == manifest_of(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_transformers_models_go_around(models, name):
    model = SplitQuantPass()(getattr(models, name)())
    torch.manual_seed(1)
    skeleton = rebuilt(model, getattr(models, name)().train())
    for key, tensor in model.state_dict().items():
        assert torch.equal(skeleton.state_dict()[key], tensor), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_parts_have_the_dtype_of_the_saved_ones(models, dtype):
    model = SplitQuantPass()(models.mlp().to(dtype))
    skeleton = rebuilt(model, models.mlp())
    assert {part.weight.dtype for part in skeleton[0].children()} == {dtype}


def test_a_root_layer(assert_same_function):
    split = SplitQuantPass()(nn.Linear(5, 4))
    skeleton = rebuilt(split, nn.Linear(5, 4))
    assert isinstance(skeleton, SplitModule)
    assert_same_function(skeleton, split, torch.randn(2, 5), atol=0)


def test_shared_modules_and_tied_weights_stay_so(models):
    model = SplitQuantPass()(models.tied())
    skeleton = rebuilt(model, models.tied())
    assert skeleton.first is skeleton.again
    assert skeleton.twin.lower.weight is skeleton.first.lower.weight


def test_an_untied_head(models, tokens):
    model = SplitQuantPass(untie_embeddings=True)(models.gpt2())
    fresh = models.gpt2()
    skeleton = rebuilt(model, fresh)
    skeleton.tie_weights()  # as transformers does after loading; there is nothing left to tie
    assert torch.equal(skeleton(tokens).logits, model(tokens).logits)


class Other(nn.Sequential):
    pass


LAYERS = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)]
WRONG = {
    "a layer is missing": (LAYERS[:3], "a layer 4, and Other has none of that name"),
    "another shape": ([*LAYERS[:4], nn.Linear(16, 3)], r"4 had shape \(2, 16\) when it was split, and has \(3, 16\)"),
    "another type": ([*LAYERS[:4], nn.LayerNorm(16)], "4 was a linear when it was split, and is a LayerNorm here"),
    "a convolution": ([*LAYERS[:4], nn.Conv1d(16, 2, 1)], "4 was a linear when it was split, and is a Conv1d here"),
    "no bias": ([*LAYERS[:4], nn.Linear(16, 2, bias=False)], "4 has a bias in only one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_skeleton_is_an_error_and_is_left_alone(models, case):
    layers, problem = WRONG[case]
    model = SplitQuantPass()(models.mlp())
    wrong = Other(*copy.deepcopy(layers))
    before = list(wrong.modules())
    with pytest.raises(SkeletonMismatchError, match=problem):
        apply_manifest(wrong, manifest_of(model))
    assert list(wrong.modules()) == before


def test_batchnorms_are_put_back_where_the_skeleton_does_not_fit(models):
    model = SplitQuantPass()(models.conv())
    wrong = models.conv()
    wrong.head = nn.Linear(8, 6)
    before = list(wrong.modules())
    with pytest.raises(SkeletonMismatchError):
        apply_manifest(wrong, manifest_of(model))
    assert list(wrong.modules()) == before


def test_a_split_model_is_no_skeleton(models):
    model = SplitQuantPass()(models.mlp())
    with pytest.raises(AlreadySplitError):
        apply_manifest(model, manifest_of(model))
    with pytest.raises((AlreadySplitError, SkeletonMismatchError)):
        apply_manifest(nn.Sequential(*model), manifest_of(model))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parts": ("a", "b", "c")}, "parts"),
        ({"k": 2}, "parts"),
        ({"bias_parts": ("elsewhere",)}, "parts"),
        ({"also_known_as": ("2",)}, "2 was the same module as 0"),
        ({"also_known_as": ("new",)}, "new was the same module as 0"),
        ({"shared_with": "9"}, "0 shares the parts of 9"),
        ({"shared_with": "2"}, "0 shares the parts of 2"),
        ({"dtype": "load"}, "0 had dtype 'load'; choose from float64"),
        ({"kind": "conv9d"}, "0 was a conv9d"),
    ],
)
def test_a_record_that_does_not_hold(models, change, problem):
    manifest = manifest_of(SplitQuantPass()(models.mlp())).model_copy(deep=True)
    manifest.layers[0] = manifest.layers[0].model_copy(update=change)
    fresh = models.mlp()
    before = list(fresh.modules())
    with pytest.raises(SkeletonMismatchError, match=problem):
        apply_manifest(fresh, manifest)
    assert list(fresh.modules()) == before
