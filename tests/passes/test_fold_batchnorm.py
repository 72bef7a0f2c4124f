"""Folding BatchNorm into the convolution before it, and where that would change the function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, manifest_of
from splitquant_plugins.errors import SplitFailedError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms_left(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def split(model, assert_same_function=None, *inputs, **options):
    reference = copy.deepcopy(model)
    model = SplitQuantPass(**options)(model)
    if assert_same_function:
        assert_same_function(model, reference, *inputs)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_sequential(models, assert_same_function, dimensions, affine, bias):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(conv(2, 4, 3, bias=bias), NORMS[dimensions - 1](4, affine=affine), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    if affine:
        models.settle(model)
    model = split(model, assert_same_function, torch.randn(2, 2, *[5] * dimensions))
    assert isinstance(model[1], nn.Identity)
    assert manifest_of(model).notes == ["BatchNorm 1 is folded into 0"]
    assert manifest_of(model).split[0].bias_parts


def test_residual_blocks_with_functional_relu(models, images, assert_same_function):
    model = split(models.conv(), assert_same_function, images)
    assert not norms_left(model)
    assert len(manifest_of(model).notes) == 2


def test_transformers_resnet(models, images, assert_same_function):
    model = models.resnet()
    count = len(norms_left(model))
    assert count >= 7
    model = split(model, assert_same_function, images)
    assert not norms_left(model)
    assert sum("is folded into" in note for note in manifest_of(model).notes) == count


def test_it_can_be_switched_off(models, images, assert_same_function):
    model = split(models.conv(), assert_same_function, images, fold_batchnorm=False)
    assert norms_left(model) == ["norm1", "norm2"]
    assert manifest_of(model).notes == []


def test_training_mode_is_not_folded(models):
    model = models.conv().train()
    model = SplitQuantPass()(model)
    assert norms_left(model) == ["norm1", "norm2"]
    assert all("training mode; call model.eval()" in note for note in manifest_of(model).notes)


class Wired(nn.Module):
    """A convolution and a BatchNorm, wired by a function of the two."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.wire = forward

    def forward(self, x):
        return self.wire(self, x)


WIRES = {
    "the convolution is called twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "the norm is called twice": lambda m, x: m.norm(m.norm(m.conv(x))),
    "the convolution's output is used twice": lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
    "something lies between": lambda m, x: m.norm(m.conv(x).relu()),
    "the norm comes first": lambda m, x: m.conv(m.norm(x)),
    "they are apart": lambda m, x: m.conv(x) + m.norm(x),
    "the weight is read": lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean(),
    "the weight is applied by hand": lambda m, x: m.norm(m.conv(x)) + nn.functional.conv2d(x, m.conv.weight, padding=1),
    "a statistic is read": lambda m, x: m.norm(m.conv(x)) * m.norm.running_var.mean(),
}


@pytest.mark.parametrize("case", WIRES)
def test_what_would_change_the_function_is_not_folded(models, images, case, assert_same_function):
    model = models.settle(Wired(WIRES[case])).eval()
    model = split(model, assert_same_function, images)
    assert norms_left(model) == ["norm"]
    (note,) = manifest_of(model).notes
    assert note == "BatchNorm norm is not folded: it does not directly follow a convolution of its own"


class Features(Wired):
    """A model that has a second way through."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.norm(m.conv(x)))
        self.prepare()

    def prepare(self):
        self.conv.requires_grad_(True)  # what only the constructor calls is no way through

    def features(self, x):
        return self.first(x)

    def first(self, x):
        return self.conv(x)


class Domains(nn.Module):
    """A norm for each of two kinds of data, chosen by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.domain = 0

    def forward(self, x):
        return self.norms[self.domain](self.conv(x))


def test_a_second_way_through_is_seen(models, images, assert_same_function):
    model = models.settle(nn.Sequential(Features())).eval()
    expected = model[0].features(images)
    model = split(model, assert_same_function, images)
    torch.testing.assert_close(model[0].features(images), expected)
    (note,) = manifest_of(model).notes
    assert note == "BatchNorm 0.norm is not folded: Features.first uses conv, too"


def test_a_norm_that_did_not_run_may_run_another_time(models, images, assert_same_function):
    model = models.settle(Domains()).eval()
    other = copy.deepcopy(model)
    other.domain = 1
    model = split(model, assert_same_function, images)
    model.domain = 1
    assert_same_function(model, other, images)
    first, _ = manifest_of(model).notes
    assert first == "BatchNorm norms.0 is not folded: 1 beside it did not run, and may run in its place"


class Optional(nn.Module):
    """Branches on an argument that is usually left out."""

    def __init__(self, *, given: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.given = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), given

    def forward(self, x, mask=None):
        x = self.conv(x)
        if (mask is None) != self.given:
            x = 3 * x
        return self.norm(x)


@pytest.mark.parametrize("given", [False, True])
def test_branches_on_an_optional_argument(models, images, given, assert_same_function):
    model = models.settle(Optional(given=given)).eval()
    model = split(model, assert_same_function, images)
    assert norms_left(model) == ["norm"]


def test_a_shared_norm_or_convolution_is_not_folded(models, images, assert_same_function):
    norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
    for layers in ([nn.Conv2d(3, 3, 3), norm, nn.Conv2d(3, 3, 3), norm], [conv, nn.BatchNorm2d(3), conv]):
        model = models.settle(nn.Sequential(*layers)).eval()
        model = split(model, assert_same_function, images)
        assert len(norms_left(model)) == 1


def test_convolutions_with_one_weight_are_not_folded(models, images, assert_same_function):
    model = models.settle(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))).eval()
    model[2].weight = model[0].weight
    split(model, assert_same_function, images)


def test_below_a_model_that_cannot_be_traced_nothing_is_folded(models, images, assert_same_function):
    """Nobody sees what else the model does with its block; transformers' code is known, and has its blocks folded."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.block(x) if x.sum() > -1e9 else x

    model = split(models.settle(Branching()).eval(), assert_same_function, images)
    assert norms_left(model) == ["block.1"]
    assert any("cannot be traced" in note for note in manifest_of(model).notes)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.SyncBatchNorm(4)])
def test_norms_of_another_kind_are_not_folded(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    model = SplitQuantPass()(model)
    assert model[1] is norm


def test_a_norm_with_hooks_is_not_folded(models):
    model = models.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    model[1].register_forward_hook(lambda *_: None)
    assert norms_left(SplitQuantPass()(model)) == ["1"]


@pytest.mark.filterwarnings("ignore:SplitQuantPass splits no layer")
def test_a_parametrized_convolution_is_not_folded(models, images, assert_same_function):
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = models.settle(nn.Sequential(conv, nn.BatchNorm2d(4))).eval()
    split(model, assert_same_function, images)


def test_statistics_that_are_not_finite_name_the_layer_and_leave_the_model_alone(models):
    model = models.settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    model[1].running_var[2] = float("nan")
    before = list(model.modules())
    with pytest.raises(SplitFailedError, match=r"^0\.weight has 27 NaN"):
        SplitQuantPass()(model)
    assert list(model.modules()) == before
    assert bool(torch.isfinite(model[0].weight).all())
