"""Calibration, budgets and DecoupleQPass on exported graphs: the graph is run with modules in its layers' places."""

from __future__ import annotations

import copy

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, split_graph
from splitquant_pt2e.compat import prepare_pt2e
from splitquant_pt2e.graph_modules import GraphModules
from splitquant_pt2e.layers import layer_calls, layer_name
from torch import nn

from splitquant_plugins import DecoupleQPass, manifest_of
from splitquant_plugins.errors import ConfigError, InputError


class Net(nn.Module):
    """Convolutions with every kind of geometry, a layer that is called twice, attention."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.depthwise = nn.Conv2d(8, 8, 3, 2, padding=(1, 0), groups=8, bias=False)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.first(x)))).mean((2, 3))
        x = self.blocks(self.blocks(x)).unsqueeze(1)
        return {"logits": self.head(self.attention(x, x, x, need_weights=False)[0])}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    tilted = torch.linspace(0.2, 3, 8)
    return [torch.randn(16, 3, 8, 8, generator=generator) * tilted for _ in range(3)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def by_name(graph):
    layers = {}
    for call in layer_calls(graph):
        layers.setdefault(layer_name(call), []).append(call)
    return layers


@torch.no_grad()
def test_a_graph_runs_with_modules_in_its_layers_places(net, export, batches):
    graph = export(net, batches[0])
    seen = GraphModules(graph, by_name(graph))
    expected = net(batches[1])["logits"]
    assert torch.equal(seen(batches[1])["logits"], expected)
    found = {name: type(module) for name, module in seen.named_modules() if any(True for _ in module.parameters(False))}
    assert list(found) == ["first", "depthwise", "blocks.0", "attention.in_proj", "attention.out_proj", "head"]
    assert list(found.values()) == [nn.Conv2d, nn.Conv2d, *[nn.Linear] * 4]
    seen.head = nn.Linear(8, 4)
    assert not torch.equal(seen(batches[1])["logits"], expected)
    assert torch.equal(graph(batches[1])["logits"], expected)


@torch.no_grad()
def test_weights_that_are_stored_transposed(batches):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(5, 8), nn.ReLU(), Conv1D(3, 5)), torch.randn(4, 8)
    graph = torch.export.export(model, (x,)).module()
    seen = GraphModules(graph, by_name(graph))
    assert [tuple(module.weight.shape) for module in (seen.get_submodule("0"), seen.get_submodule("2"))] == [
        (5, 8),
        (3, 5),
    ]
    torch.testing.assert_close(seen(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"k": 2}, {"budget": 8.0}], ids=str)
def test_calibrated_parts_are_those_of_the_modules(split, net, quantize, batches, options):
    """The same pass on the modules, before the export, gives the same program."""
    quantizer = LowBitWeightQuantizer("int2", scheme="symmetric")
    graph = quantize(
        copy.deepcopy(net), split(calibration=batches, split_bias=False, **options) + quantizer, batches[0]
    )
    kept = split(calibration=batches, split_bias=False, exclude=("attention*",), **options)
    before = kept.apply(copy.deepcopy(net), grid=quantizer.grid)
    modules, layers = manifest_of(before), manifest_of(graph)
    if "k" in options:  # a budget is shared with the layers that modules do not have
        assert [one.model_copy(update={"seconds": 0.0}) for one in modules.split] == [
            one.model_copy(update={"seconds": 0.0}) for one in layers.split if not one.name.startswith("attention")
        ]
    assert len({one.k for one in layers.split}) > ("budget" in options)
    blind = quantize(copy.deepcopy(net), split(k=2, split_bias=False) + quantizer, batches[0])
    if "k" in options:
        expected = net(batches[1])["logits"]
        assert (graph(batches[1])["logits"] - expected).norm() < (blind(batches[1])["logits"] - expected).norm()


@torch.no_grad()
def test_decoupleq_solves_the_layers_of_a_graph(pt2e_plugins, split, net, quantize, batches, sqnr):
    solver = DecoupleQPass(calibration=batches, plugins=pt2e_plugins)
    quantizer = LowBitWeightQuantizer("int4", scheme="symmetric")
    expected = net(batches[1])["logits"]
    found = {}
    for name, recipe in {
        "plain": quantizer,
        "solved": solver + quantizer,
        "both": split(k=2) + solver + quantizer,
    }.items():
        graph = quantize(copy.deepcopy(net), recipe, batches[0])
        found[name] = sqnr(expected, graph(batches[1])["logits"])
        if name != "plain":
            manifest = manifest_of(graph)
            assert len(manifest.solved) == 6
            assert len(manifest.split) == (6 if name == "both" else 0)
    assert found["plain"] + 1 < found["solved"] < found["both"] - 3


def test_batches_that_do_not_fit_the_graph_are_named(split, net, export, batches):
    recipe = split(calibration=[batches[0], batches[1][:4]]) + LowBitWeightQuantizer("int4")
    with pytest.raises(InputError, match="calibration batch 2"):
        prepare_pt2e(export(net, batches[0]), recipe)


def test_calibration_without_a_grid_is_an_error(split, net, export, batches):
    with pytest.raises(ConfigError, match="none is known: pass a grid to split_graph"):
        split_graph(export(net, batches[0]), split(calibration=batches))
    with pytest.raises(ConfigError, match="budget needs the grid"):
        split_graph(export(net, batches[0]), split(budget=4.0))


def test_a_weight_that_something_else_reads_is_named(pt2e_plugins, batches):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x) + self.layer.weight.sum()

    recipe = DecoupleQPass(calibration=[torch.randn(16, 8)], plugins=pt2e_plugins) + LowBitWeightQuantizer("int2")
    graph = torch.export.export(Odd(), (torch.randn(16, 8),)).module()
    with pytest.raises(InputError, match=r"layer: its weight is also read by sum"):
        prepare_pt2e(graph, recipe)
