"""Where kernels write integers only, every part and every sum has a scale, and layers that would lose stay whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, Pt2eGrid, integer_sums, stored_weights
from splitquant_pt2e.compat import (
    ANNOTATION,
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    prepare_pt2e,
)
from splitquant_pt2e.integer_sums import partial_sum_cost, sum_costs, weighed
from torch import nn
from torchao.quantization.pt2e import FakeQuantize
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec

from splitquant_plugins import manifest_of
from splitquant_plugins.errors import SplitQuantWarning
from splitquant_plugins.passes.split_layer import Errors, SplitTensors
from splitquant_plugins.solvers.rounding_error import weight_error

aten = torch.ops.aten
ACTIVATIONS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.sigmoid.default)
pytestmark = pytest.mark.filterwarnings("ignore:splitter .*partial sums")


def activation_spec(bits=8, *, fake=False):
    observer = HistogramObserver.with_args(eps=2**-16) if bits == 8 else MinMaxObserver.with_args(eps=2**-24)
    return QuantizationSpec(
        torch.int8 if bits == 8 else torch.int16,
        FakeQuantize.with_args(observer=observer) if fake else observer,
        -(2 ** (bits - 1)),
        2 ** (bits - 1) - 1,
        torch.per_tensor_affine,
        is_dynamic=False,
    )


def derive(observers):
    (act, _), (weight, _) = (observer.calculate_qparams() for observer in observers)
    return act * weight, torch.zeros_like(act * weight, dtype=torch.int32)


class IntegerQuantizer(Quantizer):
    """As the quantizers of NPUs: activations are fused into the layers before them, biases are integers."""

    def __init__(self, *, bias=True, granularity="channel", **activations):
        super().__init__()
        self.bias = bias
        self.granularity = granularity
        self.activations = activations

    def annotate(self, model):
        channel = self.granularity == "channel"
        weight = QuantizationSpec(
            torch.int8,
            (PerChannelMinMaxObserver if channel else MinMaxObserver).with_args(eps=2**-20),
            -127,
            127,
            torch.per_channel_symmetric if channel else torch.per_tensor_symmetric,
            ch_axis=0 if channel else None,
        )
        for node in model.graph.nodes:
            if node.target not in (aten.conv2d.default, aten.linear.default):
                continue
            inputs = {node.args[0]: activation_spec(**self.activations), node.args[1]: weight}
            if self.bias:
                edges = [(node.args[0], node), (node.args[1], node)]
                qscheme = weight.qscheme
                inputs[node.args[2]] = DerivedQuantizationSpec(
                    edges, derive, torch.int32, -(2**31), 2**31 - 1, qscheme, 0 if channel else None
                )
            (user,) = node.users
            fused = user.target in ACTIVATIONS
            node.meta[ANNOTATION] = QuantizationAnnotation(
                inputs, None if fused else activation_spec(**self.activations), _annotated=True
            )
            if fused:
                user.meta[ANNOTATION] = QuantizationAnnotation({}, activation_spec(**self.activations), _annotated=True)
        return model

    def validate(self, model):
        pass


def convolutions(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for index in (0, 2, 4):
            model[index].weight.view(-1)[::29] *= 8
    return model.eval()


def scales(node):
    """Scale and zero point that a node's output is quantized with, by its only user."""
    (user,) = node.users
    return tuple(user.args[1:3]) if "quantize_per_tensor" in str(user.target) else None


@torch.no_grad()
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 1), nn.Sigmoid()], ids=str)
def test_every_part_and_every_sum_is_quantized(split, quantize, sqnr, activation, k):
    model, x = convolutions(activation), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = quantize(model, IntegerQuantizer(), x)
    graph = quantize(model, split(k=k, splitter="residual") + IntegerQuantizer(), x)
    layers = [node for node in graph.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    sums = [node for node in graph.graph.nodes if node.target == aten.add.Tensor]
    assert (len(layers), len(sums)) == (3 * k, 3 * (k - 1))
    for node in (*layers, *sums):
        assert scales(node) is not None
        assert all("dequantize" in str(source.target) for source in node.all_input_nodes)
    applied = next(node for node in graph.graph.nodes if node.target in ACTIVATIONS)
    same = next(node for node in plain.graph.nodes if node.target in ACTIVATIONS)
    assert scales(applied) == pytest.approx(scales(same), rel=1e-5)
    before = applied.args[0].args[0].args[0]
    assert before in sums
    if not isinstance(activation, nn.Sigmoid):  # the activation only ends where the codes of the sum end
        assert scales(before) == pytest.approx(scales(applied), rel=1e-6)
    assert "write integers only" in "".join(manifest_of(graph).notes)
    assert sqnr(model(x), graph(x)) > sqnr(model(x), plain(x)) - 3


@torch.no_grad()
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("bits", "wider"), [(8, 1), (16, 4)])
def test_where_there_are_codes_to_spare_partial_sums_have_room_for_what_calibration_did_not_see(
    split, quantize, monkeypatch, bits, wider, fake
):
    model, x = convolutions(nn.ReLU()), torch.randn(16, 3, 8, 8)
    recipe = split(k=3, splitter="kmeans") + IntegerQuantizer(bits=bits, fake=fake)
    graphs = [quantize(model, recipe, x)]
    monkeypatch.setattr(integer_sums, "_HEADROOM", 1.0)
    graphs.append(quantize(model, recipe, x))
    layers, sums = (
        [[node for node in graph.graph.nodes if node.target in targets] for graph in graphs]
        for targets in ((aten.conv2d.default, aten.linear.default), (aten.add.Tensor,))
    )
    for found in (layers, [each[::2] for each in sums]):  # the first of each layer's two sums is a partial one
        scale, alone = ([scales(node)[0] for node in each] for each in found)
        assert scale == pytest.approx([wider * each for each in alone], rel=1e-2 if fake else 1e-6)
    scale, alone = ([scales(node) for node in each[1::2]] for each in sums)
    assert scale == [pytest.approx(each, rel=1e-2 if fake else 1e-6) for each in alone]


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 16])
def test_values_go_through_observers_of_partial_sums_as_they_are(split, export, bits):
    model, x = convolutions(nn.ReLU()), torch.randn(16, 3, 8, 8)
    prepared = prepare_pt2e(export(model, x), split(k=2, splitter="residual") + IntegerQuantizer(bits=bits))
    torch.testing.assert_close(prepared(x), model(x))


@torch.no_grad()
def test_floats_stay_floats_where_biases_are(split, quantize):
    model, x = convolutions(nn.ReLU()), torch.randn(4, 3, 8, 8)
    graph = quantize(model, split(k=2, splitter="residual") + IntegerQuantizer(bias=False), x)
    layers = [node for node in graph.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    assert [scales(node) for node in layers] == [None] * 6
    assert not manifest_of(graph).notes


def weights(outlier):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = outlier
    return weight


def split_in_two(weight):
    large = torch.where(weight.abs() > 5, weight, 0.0)
    return SplitTensors([weight - large, large], [None, None], 0.0)


def with_error(weight, parts, grid):
    error = Errors(weight_error(weight, [weight], grid), weight_error(weight, parts, grid))
    return SplitTensors(list(parts), [None] * len(parts), 0.0, error=error)


def test_what_a_split_gains_is_weighed_against_its_sums():
    grid = Pt2eGrid(-127, 127, "symmetric", "tensor")
    tensors = {"calm": weights(2.0), "wild": weights(40.0), "float": weights(2.0)}
    split = {name: with_error(weight, split_in_two(weight).weight, grid) for name, weight in tensors.items()}
    specs = {"calm": activation_spec(), "wild": activation_spec(), "float": None}
    costs = sum_costs(split, specs)
    assert set(costs) == {"calm", "wild"}
    out = weighed(split, specs, costs, "auto")
    assert {name: result.reason is None for name, result in out.items()} == {"calm": False, "wild": True, "float": True}
    assert "quantizes partial sums to 8 bits" in out["calm"].reason
    with pytest.warns(SplitQuantWarning, match=r"'range'.* in 1 of 3 layers \(calm\)"):
        assert weighed(split, specs, costs, "range") == split
    wide = dict.fromkeys(tensors, activation_spec(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = {name: with_error(w, [w.round(), w - w.round()], grid) for name, w in tensors.items()}
        out = weighed(fine, wide, sum_costs(fine, wide), "auto")
        assert out == fine  # at 16 bits sums cost next to nothing


@torch.no_grad()
def test_a_model_that_would_lose_stays_whole_with_one_warning(split, quantize):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with pytest.warns(SplitQuantWarning) as caught:
        graph = quantize(model, split(k=2) + IntegerQuantizer(), torch.randn(16, 64))
    (only,) = [str(one.message) for one in caught if one.category is SplitQuantWarning]
    assert "no layer of the graph was split" in only
    assert "quantizes partial sums to 8 bits" in only
    assert not manifest_of(graph).split


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(("k", "uneven"), [(2, 1.0), (2, 8.0), (3, 1.0)])
def test_the_cost_of_partial_sums_is_what_their_scales_do(k, uneven, observed):
    """Against what rounding partial sums to 8 bits really adds, for Gaussian inputs: at most 2.5 times as much."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    weight[0] *= uneven
    coarse = weight.round()
    parts = [coarse, weight - coarse] if k == 2 else [coarse, (weight - coarse) / 2, (weight - coarse) / 2]
    x = torch.randn(4096, 64, generator=generator) * (torch.linspace(0.2, 3, 64) if observed else 1.0)
    moment = (x.t() @ x / len(x)).unsqueeze(0) if observed else None
    added = 0.0
    for tensor in [*parts, *([parts[0] + parts[1]] if k == 3 else [])]:
        y = x @ tensor.t()
        scale = (y.max() - y.min()) / 255
        added += float(((y / scale).round() * scale - y).square().sum(dim=1).mean())
    cost = partial_sum_cost(parts, activation_spec(), moment)
    assert added < cost < added * 2.5  # fewer values reach less far than the rule has it


@torch.no_grad()
def test_biases_of_integers_are_no_stored_weights(split, quantize):
    model, x = convolutions(nn.ReLU()), torch.randn(4, 3, 8, 8)
    found = stored_weights(quantize(model, split(k=2, splitter="residual") + IntegerQuantizer(), x))
    assert {name: [tuple(part.weight.shape) for part in parts] for name, parts in found.items()} == {
        name: [tuple(model.get_submodule(name).weight.shape)] * 2 for name in ("0", "2", "4")
    }


def test_weight_only_recipes_are_no_integer_targets(split, quantize):
    graph = quantize(convolutions(nn.ReLU()), split(k=2) + LowBitWeightQuantizer("int4"), torch.randn(2, 3, 8, 8))
    assert not manifest_of(graph).notes
