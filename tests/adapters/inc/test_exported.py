"""W8A8 through INC's export path."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import (
    DynamicQuantConfig,
    RTNConfig,
    StaticQuantConfig,
    convert,
    load,
    prepare,
)
from splitquant_inc import save
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError
from splitquant_plugins.manifest import ATTRIBUTE

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export and torchao deprecate their own
KINDS = [StaticQuantConfig, DynamicQuantConfig]


def quantize(model, recipe, x):
    prepared = prepare(export(model, example_inputs=(x,)), recipe, example_inputs=(x,))
    prepared(x)
    return convert(prepared)


def calls(graph):
    return Counter(str(node.target).rpartition("aten.")[2] for node in graph.graph.nodes if node.op == "call_function")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("way", ["before", "recipe"])
def test_split_w8a8(models, split_pass, sqnr, kind, activations, way):
    x = torch.randn(32, 12)
    model = models.mlp()
    wanted = model(x)
    first = split_pass(activations=activations)
    graph = quantize(first(model), kind(), x) if way == "before" else quantize(model, first + kind(), x)
    assert sqnr(wanted, graph(x)) > 20
    found = calls(graph)
    assert found["linear.default"] == 9
    weights = sum("quantize" in str(n.target) and str(n.args[0]).endswith("weight") for n in graph.graph.nodes)
    assert weights == 9
    assert found["cat.default"] == (2 if activations else 0)
    if kind is StaticQuantConfig and way == "recipe":
        scales = {n.args[1] for n in graph.graph.nodes if ".quantize_per_tensor" in str(n.target)}
        assert len(scales) == (7 if activations else 3)


def test_an_unexported_or_split_model_is_refused(models, split_pass):
    x = torch.randn(4, 12)
    with pytest.raises(InputError, match="export"):
        prepare(models.mlp(), split_pass() + StaticQuantConfig(), example_inputs=(x,))
    with pytest.raises(AlreadySplitError):
        prepare(export(split_pass()(models.mlp()), example_inputs=(x,)), split_pass() + StaticQuantConfig())


def test_a_sequence_of_passes_is_for_modules(models, split_pass):
    x = torch.randn(4, 12)
    both = split_pass(k=2) + split_pass()
    with pytest.raises(ConfigError, match="does not work on an exported graph"):
        prepare(export(models.mlp(), example_inputs=(x,)), both + StaticQuantConfig())


def test_without_the_graph_split_the_error_says_to_split_first(models, split_pass, monkeypatch):
    monkeypatch.setattr("splitquant_inc.exported.GRAPH_SPLIT", "no_such_package.graph")
    exported = export(models.mlp(), example_inputs=(torch.randn(4, 12),))
    with pytest.raises(ConfigError, match=r"export\(SplitQuantPass\(\)\(model\)"):
        prepare(exported, split_pass() + StaticQuantConfig())


@torch.no_grad()
def test_incs_own_save_and_load(models, split_pass, tmp_path):
    x = torch.randn(8, 12)
    graph = quantize(models.mlp(), split_pass() + StaticQuantConfig(), x)
    expected = graph(x)
    with pytest.raises(InputError, match=r"model\.save"):
        save(graph, tmp_path)
    graph.save(example_inputs=(x,), output_dir=str(tmp_path))
    assert torch.equal(load(str(tmp_path))(x), expected)


def test_the_manifest_stays_with_the_graph(models, split_pass):
    x = torch.randn(4, 12)
    graph = quantize(models.mlp(), split_pass() + StaticQuantConfig(), x)
    assert len(graph.meta[ATTRIBUTE].split) == 3
    assert not any(isinstance(module, nn.Linear) for module in graph.modules())


def test_weight_only_recipes_are_for_modules(models, split_pass):
    exported = export(models.mlp(), example_inputs=(torch.randn(4, 12),))
    with pytest.raises(InputError, match="exported graph"):
        prepare(exported, split_pass() + RTNConfig())


class Residual(nn.Module):
    """Convolutions with BatchNorm, and a sum behind a convolution, which X86's fusion patterns look for."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(y) + y).mean((2, 3)))


def counts(graph):
    found = Counter(str(node.target).rpartition(".default")[0].rpartition(".")[2] for node in graph.graph.nodes)
    return {name: found[name] for name in ("quantize_per_channel", "quantize_per_tensor", "conv2d", "batch_norm")}


@torch.no_grad()
@pytest.mark.parametrize("splitter", [None, "grid"])
def test_partial_sums_of_convolutions_are_not_quantized(split_pass, sqnr, splitter):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 8, 8)
    wanted = model(x)
    plain = quantize(model, StaticQuantConfig(), x)
    first = split_pass() if splitter is None else SplitQuantPass(splitter=splitter)
    split = quantize(model, first + StaticQuantConfig(), x)
    expected = {"quantize_per_channel": 3, "quantize_per_tensor": 3, "conv2d": 2, "batch_norm": 0}
    assert counts(plain) == expected
    assert counts(split) == {**expected, "quantize_per_channel": 9, "conv2d": 6}
    assert sqnr(wanted, split(x)) > sqnr(wanted, plain(x)) - 1


def test_a_refused_graph_keeps_no_annotations(split_pass):
    exported = export(Residual().eval(), example_inputs=(torch.randn(4, 3, 8, 8),))
    for first in (split_pass(include="no_such_layer"), SplitQuantPass(splitter="grid", budget=4.0)):
        with pytest.raises(ConfigError):
            prepare(exported, first + StaticQuantConfig())
        assert not [node for node in exported.graph.nodes if "quantization_annotation" in node.meta]


@torch.no_grad()
def test_layers_that_set_local_leaves_float_stay_whole(split_pass):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 8, 8)
    recipe = StaticQuantConfig()
    recipe.set_local("second", StaticQuantConfig(w_dtype="fp32", act_dtype="fp32"))
    graph = quantize(model, split_pass() + recipe, x)
    assert counts(graph)["conv2d"] == 4
    manifest = graph.meta[ATTRIBUTE]
    assert [record.name for record in manifest.split] == ["first", "head"]
    assert {record.name: record.reason for record in manifest.kept} == {"second": "the recipe does not quantize it"}
