"""Splitting activation layers: which, along which dimension, in which chunks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitActivation
from splitquant_plugins.passes.split_activations import ELEMENTWISE

ASKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish)
INPLACE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.SELU, nn.CELU, nn.Hardsigmoid)


def activation_of(model: nn.Module) -> SplitActivation:
    (found,) = (module for module in model.modules() if isinstance(module, SplitActivation))
    return found


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_torch_activations(kind, assert_same_function):
    model = nn.Sequential(nn.Linear(5, 7), kind())
    reference = copy.deepcopy(model)
    model = SplitQuantPass(activations=True)(model)
    assert [type(chunk) for chunk in activation_of(model).children()] == [kind] * 3
    assert manifest_of(model).notes == [f"activation 1 ({kind.__name__}) is split in 3 along -1"]
    assert_same_function(model, reference, torch.randn(4, 5))


def test_those_that_were_asked_for_are_among_them():
    assert set(ASKED) <= set(ELEMENTWISE)


def hugging_face_activations() -> list[str]:
    return [
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_python",
        "quick_gelu",
        "gelu_10",
        "relu2",
        "mish",
        "laplace",
        "linear",
    ]


@pytest.mark.parametrize("name", hugging_face_activations())
def test_transformers_activations(name, assert_same_function):
    activations = pytest.importorskip("transformers.activations")
    model = nn.Sequential(nn.Linear(5, 7), activations.ACT2FN[name])
    reference = copy.deepcopy(model)
    model = SplitQuantPass(activations=True)(model)
    assert isinstance(model[1], SplitActivation)
    assert_same_function(model, reference, torch.randn(4, 5))


@given(n=st.integers(1, 20), k=st.integers(2, 6))
def test_chunks_are_n_over_k_and_together_n(n, k):
    split = SplitActivation(nn.Tanh(), k, -1)
    sizes = []
    for chunk in split.children():
        chunk.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    x = torch.randn(3, n)
    assert torch.equal(split(x), torch.tanh(x))
    assert len(sizes) == k
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


def chunks_see(model: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    seen = []
    for chunk in activation_of(model).children():
        chunk.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    model(x)
    return seen


@pytest.mark.parametrize(
    ("layer", "shape", "dim", "first"),
    [
        (nn.Linear(5, 8), (2, 4, 5), -1, (2, 4, 3)),
        (nn.Conv1d(2, 8, 1), (2, 2, 6), -2, (2, 3, 6)),
        (nn.Conv2d(2, 8, 1), (2, 2, 6, 6), -3, (2, 3, 6, 6)),
        (nn.Conv3d(2, 8, 1), (2, 2, 4, 4, 4), -4, (2, 3, 4, 4, 4)),
    ],
)
def test_features_are_last_after_a_linear_and_channels_after_a_convolution(layer, shape, dim, first):
    model = SplitQuantPass(activations=True)(nn.Sequential(layer, nn.ReLU()))
    assert activation_of(model).dim == dim
    assert chunks_see(model, torch.randn(shape))[0] == first


def test_the_dimension_survives_the_folding_of_a_norm(models, images, assert_same_function):
    model = models.conv()
    reference = copy.deepcopy(model)
    model = SplitQuantPass(activations=True)(model)
    assert activation_of(model).dim == -3
    assert_same_function(model, reference, images)


def test_the_dimension_is_an_option():
    model = SplitQuantPass(activations=True, activation_dim=1)(nn.Sequential(nn.Linear(5, 8), nn.ReLU()))
    assert chunks_see(model, torch.randn(2, 6, 5)) == [(2, 2, 8)] * 3


def test_off_by_default(models):
    assert not any(isinstance(module, SplitActivation) for module in SplitQuantPass()(models.mlp()).modules())
    assert not SplitQuantPass().splits_activations
    assert SplitQuantPass(activations=True).splits_activations


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Softmax(-1), "not elementwise"),
        (nn.LogSoftmax(-1), "not elementwise"),
        (nn.Softmax2d(), "not elementwise"),
        (nn.GLU(), "not elementwise"),
        (nn.PReLU(), "parameter per channel"),
        (nn.RReLU(), "random"),
    ],
)
def test_what_is_not_elementwise_is_refused(layer, reason):
    model = SplitQuantPass(activations=True)(nn.Sequential(nn.Linear(4, 4), layer))
    assert model[1] is layer
    (note,) = manifest_of(model).notes
    assert note.startswith(f"activation 1 ({type(layer).__name__}) is left whole: it ")
    assert reason in note


def test_a_subclass_of_an_activation_is_left_alone():
    class Mine(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + x.mean()

    model = SplitQuantPass(activations=True)(nn.Sequential(nn.Linear(4, 4), Mine()))
    assert type(model[1]) is Mine


@pytest.mark.parametrize("kind", INPLACE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_in_place_activations_write_into_their_input(kind, grad):
    with torch.set_grad_enabled(grad):
        outcomes = []
        for activation in (kind(inplace=True), SplitActivation(kind(inplace=True), 3, -1)):
            leaf = torch.linspace(-4, 4, 14).reshape(2, 7).requires_grad_(grad)
            x = leaf * 1
            output = activation(x)
            assert torch.equal(x, output)
            assert output.data_ptr() == x.data_ptr()
            if grad:
                output.square().sum().backward()
            outcomes.append((output.detach(), leaf.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    if grad:
        assert torch.allclose(outcomes[0][1], outcomes[1][1])


def test_a_shared_activation_is_split_once(assert_same_function):
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 4), act)
    reference = copy.deepcopy(model)
    model = SplitQuantPass(activations=True, k=2)(model)
    assert model[1] is model[3]
    assert len(manifest_of(model).notes) == 1
    assert_same_function(model, reference, torch.randn(3, 4))


def test_patterns_choose_activations_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    model = SplitQuantPass(activations=True, exclude="1")(model)
    assert [type(model[number]) for number in (1, 3)] == [nn.ReLU, SplitActivation]


def test_training_mode_is_kept(models):
    model = SplitQuantPass(activations=True)(models.mlp().train())
    assert all(module.training for module in model.modules())


def test_bert(models, tokens, assert_same_function):
    model = models.bert()
    reference = copy.deepcopy(model)
    model = SplitQuantPass(activations=True)(model)
    assert sum(isinstance(module, SplitActivation) for module in model.modules()) >= 2
    assert_same_function(model, reference, tokens)
