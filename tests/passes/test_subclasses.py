"""A subclass of a layer is split only where it adds nothing that a split would lose, and so it is with BatchNorm."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.modules import SplitModule


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Gain(nn.Linear):
    gain = 3.0


class Helpful(nn.Linear):
    def norm(self):
        return self.weight.norm()


class Mixin:
    temperature = 2.0


class Mixed(Mixin, nn.Linear):
    pass


class Widened(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("gain", torch.tensor(3.0))


class Plain(nn.Linear):
    """Adds nothing but a way to be made."""

    def __init__(self):
        super().__init__(8, 8)

    def extra_repr(self):
        return "plain"


class Parent(nn.Module):
    """Reads what its layer offers, and falls back where it offers nothing."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        gain = getattr(self.layer, "gain", 1.0) * getattr(self.layer, "temperature", 1.0)
        return self.layer(x) * gain + (self.layer.norm() if hasattr(self.layer, "norm") else 0)


@pytest.fixture
def split_same():
    """Split a copy of a model, compare the outputs, and return the copy."""

    def check(model, x):
        model.eval()
        expected = model(x)
        made = SplitQuantPass()(copy.deepcopy(model))
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
        return made

    return check


@pytest.mark.filterwarnings("ignore:SplitQuantPass splits no layer")
@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (lambda: Standardized(4, 4, 3), "_conv_forward"),
        (lambda: Doubled(8, 8), "__call__"),
        (lambda: Gain(8, 8), "gain"),
        (lambda: Helpful(8, 8), "norm"),
        (lambda: Mixed(8, 8), "temperature"),
        (Widened, "gain"),
    ],
)
def test_w1_subclasses_that_add_something_stay_whole(split_same, layer, named):
    made = split_same(Parent(layer()), torch.randn(2, 4, 8, 8))
    (record,) = manifest_of(made).kept
    assert f"a {named} of its own" in record.reason


@pytest.mark.filterwarnings("ignore:SplitQuantPass splits no layer")
def test_w1_whisper_convolutions_stay_whole(split_same):
    """Whisper's Conv1d was one that casts its weight in _conv_forward."""

    class Conv1d(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight.to(x.dtype) * 1.5, bias)

    made = split_same(nn.Sequential(Conv1d(4, 4, 3)), torch.randn(2, 4, 8))
    assert not manifest_of(made).split


@pytest.mark.filterwarnings("ignore:SplitQuantPass splits no layer")
def test_w1_a_function_on_one_layer_keeps_it_whole(split_same):
    layer = nn.Linear(8, 8)
    layer.norm = types.MethodType(lambda self: self.weight.norm(), layer)
    assert not manifest_of(split_same(Parent(layer), torch.randn(2, 8))).split


def test_what_a_parent_noted_on_a_layer_is_kept(split_same):
    layer = nn.Linear(8, 8)
    layer.gain = 3.0
    made = split_same(Parent(layer), torch.randn(2, 8))
    assert isinstance(made.layer, SplitModule)
    assert made.layer.gain == 3.0


def test_a_subclass_that_adds_nothing_is_split(split_same):
    assert isinstance(split_same(Parent(Plain()), torch.randn(2, 8)).layer, SplitModule)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_var.fill_(3.0)

    def forward(self, x):
        return self.bn(self.conv(x))


class Elsewhere(nn.Module):
    """Cannot be traced, and uses the block's convolution once more."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        if x.abs().max() > 0:
            return self.block(x) + self.block.conv(x)
        return self.block(x)


class ReadsNorm(Block):
    def forward(self, x):
        return super().forward(x) * self.bn.weight.sum()


class Indexes(nn.Module):
    """Cannot be traced, and goes through the parts of a sequence."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval())
        self.block[1].running_var.fill_(3.0)

    def forward(self, x):
        if x.abs().max() > 0:
            return self.block(x) + next(iter(self.block))(x)
        return self.block(x)


@pytest.mark.parametrize("model", [Elsewhere, ReadsNorm, Indexes])
def test_w2_a_norm_that_may_be_used_elsewhere_is_not_folded(split_same, model):
    made = split_same(model(), torch.randn(2, 4, 8, 8))
    assert any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert any("is not folded" in note for note in manifest_of(made).notes)
