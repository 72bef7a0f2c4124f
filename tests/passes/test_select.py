"""Which layers are split, and the reason of each that is not."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from splitquant_plugins import LayerPlan, Skip, SplitQuantPass, UniformGrid, hookimpl, manifest_of
from splitquant_plugins.errors import ConfigError, PluginError, SplitQuantWarning
from splitquant_plugins.modules import SplitModule

NOTHING_SPLIT = pytest.mark.filterwarnings("ignore:SplitQuantPass splits no layer")


def kept(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in manifest_of(model).kept}


def names_split(model: nn.Module) -> list[str]:
    return [record.name for record in manifest_of(model).split]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "0"}, ["0"]),
        ({"include": ["0", "4"]}, ["0", "4"]),
        ({"include": "[02]"}, ["0", "2"]),
        ({"exclude": "4"}, ["0", "2"]),
        ({"include": "*", "exclude": ("0", "2")}, ["4"]),
    ],
)
def test_patterns(models, options, expected):
    model = SplitQuantPass(**options)(models.mlp())
    assert names_split(model) == expected
    reasons = kept(model)
    assert set(reasons) == {"0", "2", "4"} - set(expected)
    assert all("pattern" in reason for reason in reasons.values())


def test_patterns_match_whole_dotted_names(models, tokens):
    model = SplitQuantPass(include="bert.encoder.*", exclude="*.attention.*")(models.bert())
    assert names_split(model) == [
        f"bert.encoder.layer.{number}.{part}.dense" for number in range(2) for part in ("intermediate", "output")
    ]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(models, option):
    with pytest.raises(ConfigError, match=rf"{option} pattern 'haed' matches no module of Sequential.*named like 0, 1"):
        SplitQuantPass(**{option: ["0", "haed"]})(models.mlp())


def test_norms_and_embeddings_are_never_touched():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(9, 4),
            "bag": nn.EmbeddingBag(9, 4),
            "norm": nn.LayerNorm(4),
            "group": nn.GroupNorm(2, 4),
            "rms": nn.RMSNorm(4),
            "batch": nn.BatchNorm1d(4),
            "prelu": nn.PReLU(),
            "linear": nn.Linear(4, 4),
        }
    ).eval()
    before = dict(model.items())
    model = SplitQuantPass()(model)
    assert names_split(model) == ["linear"]
    for name, reason in kept(model).items():
        assert model[name] is before[name]
        assert type(before[name]).__name__ in reason
    assert len(kept(model)) == 7


def test_every_layer_has_a_record(models):
    model = models.conv()
    owners = {n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    model = SplitQuantPass(fold_batchnorm=False, exclude="stem")(model)
    assert {record.name for record in manifest_of(model).layers} == owners
    assert all(record.reason for record in manifest_of(model).kept)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized_bias(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


PARAMETRIZED = {
    "weight norm": parametrizations.weight_norm,
    "old weight norm": old_weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.4),
    "parametrized bias": parametrized_bias,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_layers_are_left_whole(how, make, assert_same_function):
    model = nn.Sequential(PARAMETRIZED[how](make()), nn.Conv1d(4, 3, 1)).eval()
    x = torch.randn(2, 4, 4)
    expected = model(x).detach()
    model = SplitQuantPass()(model)
    assert names_split(model) == ["1"]
    assert re.search("parametrized|hooks", kept(model)["0"])
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_a_layer_after_its_parametrization_is_removed_is_split():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert names_split(SplitQuantPass()(nn.Sequential(layer))) == ["0"]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass without a forward of its own is a Linear."""


def test_transformers_conv1d_is_known_by_its_class(assert_same_function):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    class Projection(pytorch_utils.Conv1D):
        """A subclass without a forward of its own is a Conv1D."""

    class ScaledConv1D(pytorch_utils.Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    class Conv1D(nn.Linear):
        """A Linear that is only called so."""

    model = nn.Sequential(Projection(6, 4), Conv1D(6, 5), ScaledConv1D(3, 5))
    reference = copy.deepcopy(model)
    split = SplitQuantPass()(model)
    assert [(record.name, record.kind) for record in manifest_of(split).split] == [("0", "conv1d_hf"), ("1", "linear")]
    assert "ScaledConv1D has a forward of its own" in kept(split)["2"]
    assert_same_function(split, reference, torch.randn(3, 4))


def test_a_subclass_with_its_own_forward_is_left_whole(assert_same_function):
    model = nn.Sequential(Scaled(4, 4), Renamed(4, 4))
    reference = copy.deepcopy(model)
    model = SplitQuantPass()(model)
    assert names_split(model) == ["1"]
    assert "Scaled has a forward of its own" in kept(model)["0"]
    assert_same_function(model, reference, torch.randn(2, 4))


@NOTHING_SPLIT
def test_a_forward_put_on_the_instance_is_kept():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    assert "forward of its own" in kept(SplitQuantPass()(nn.Sequential(layer)))["0"]


@NOTHING_SPLIT
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_is_left_whole(hook):
    layer = nn.Linear(4, 4)
    getattr(layer, hook)(lambda *_: None)
    assert "hooks" in kept(SplitQuantPass()(nn.Sequential(layer)))["0"]


@NOTHING_SPLIT
@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2)])
def test_transposed_convolutions_are_left_whole(layer):
    assert "transposed" in kept(SplitQuantPass()(nn.Sequential(layer)))["0"]


def test_lazy_layers_are_left_whole():
    model = SplitQuantPass()(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)))
    assert names_split(model) == ["1"]
    assert "no weight yet" in kept(model)["0"]


class Kernel(nn.Module):
    """A layer of a third party: its parameter has a name of its own, and it has a child."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.kernel.t()


class SplitKernel(SplitModule):
    pass


class KernelPlugin:
    @hookimpl
    def splitquant_select_layer(self, name, module, config):
        if isinstance(module, Kernel):
            return LayerPlan("kernel", module.kernel, None)
        return Skip("not this one") if name == "skip" else None

    @hookimpl
    def splitquant_build_module(self, parts, plan):
        if plan.kind != "kernel":
            return None
        layers = []
        for weight in parts["weight"]:
            layer = nn.Linear(4, 4, bias=False)
            layer.weight = weight
            layers.append(layer)
        return SplitKernel(layers)


@pytest.mark.parametrize("wrap", [lambda layer: nn.Sequential(layer), lambda layer: layer], ids=["child", "root"])
def test_a_layer_type_of_a_plugin(plugins, wrap, assert_same_function):
    plugins.add(KernelPlugin(), "kernel")
    model = wrap(Kernel())
    reference = copy.deepcopy(model)
    model = SplitQuantPass(plugins=plugins)(model)
    assert [record.kind for record in manifest_of(model).layers] == ["kernel"]  # and none of what is inside
    assert_same_function(model, reference, torch.randn(2, 4))


def test_a_plugin_may_refuse_a_layer_of_ours(plugins):
    plugins.add(KernelPlugin(), "kernel")
    model = nn.ModuleDict({"skip": nn.Linear(4, 4), "split": nn.Linear(4, 4)})
    model = SplitQuantPass(plugins=plugins)(model)
    assert kept(model) == {"skip": "not this one"}


def test_a_kind_that_nothing_builds_is_an_error(plugins):
    class Plugin:
        @hookimpl
        def splitquant_select_layer(self, module):
            return LayerPlan("strange", module.weight, None) if isinstance(module, nn.LayerNorm) else None

    plugins.add(Plugin(), "strange")
    model = nn.Sequential(nn.LayerNorm((3, 4)))
    nn.init.normal_(model[0].weight)
    with pytest.raises(PluginError, match="builds a split module of kind 'strange'"):
        SplitQuantPass(plugins=plugins)(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_values_is_left_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    split = SplitQuantPass(splitter="grid").apply(model, grid=UniformGrid(2))
    assert names_split(split) == ["0"]
    assert kept(split)["1"] == "it has no values"


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(3, 4), lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), lambda: nn.Embedding(3, 4)],
)
def test_a_model_of_which_nothing_is_split_is_a_warning_with_the_reasons(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(
        SplitQuantWarning, match=f"splits no layer of this {type(model).__name__}: .*(of no type|not supp)"
    ):
        split = SplitQuantPass()(model)
    assert not names_split(split)
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())
