"""`SplitQuantPass() + quantizer`: each part has its own scale, the rest of the graph is quantized as before."""

from __future__ import annotations

import copy
import operator
from dataclasses import replace

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, integer_parts, stored_weights
from splitquant_pt2e.compat import (
    HistogramObserver,
    PerChannelMinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    convert_pt2e,
    prepare_pt2e,
)
from torch import nn

from splitquant_plugins import manifest_of
from splitquant_plugins.errors import (
    AlreadyQuantizedError,
    AlreadySplitError,
    ConfigError,
    InputError,
    SplitQuantWarning,
)
from splitquant_plugins.passes.base import PassSequence

aten = torch.ops.aten


def test_attached_recipe_is_of_the_same_kind(split, x86):
    plain = x86()
    attached = split() + plain
    assert isinstance(attached, type(plain))
    assert isinstance(attached, Quantizer)
    assert attached.set_global(plain.global_config) is attached
    attached.set_module_type_qconfig(nn.Linear, None)
    assert not plain.operator_type_qconfig  # the given recipe stays as it is
    assert attached.operator_type_qconfig


def test_plain_recipe_still_does_not_split(split, x86, quantize, nets, images, count):
    plain = x86()
    split() + plain
    assert count(quantize(nets.residual(), plain, images))["conv2d"] == 2


def test_x86_partial_sums_are_not_quantized(split, x86, quantize, nets, images, count):
    """Three weights for one, and not one activation more: conv + add fusions match the model's own add only."""
    plain = count(quantize(nets.residual(), x86(), images))
    parts = count(quantize(nets.residual(), split() + x86(), images))
    assert parts["dequantize_per_channel"] == 3 * plain["dequantize_per_channel"] == 9
    assert parts["conv2d"] == 3 * plain["conv2d"]
    assert parts["quantize_per_tensor"] == plain["quantize_per_tensor"]
    assert parts["add"] == plain["add"] + 3 * 2


def test_every_part_has_its_own_scale_and_the_input_is_quantized_once(split, x86, quantize, nets, images):
    graph = quantize(nets.residual(), split() + x86(), images)
    heads = [node for node in graph.graph.nodes if node.target == aten.linear.default]
    scales = [getattr(graph, node.args[1].args[1].target) for node in heads]
    assert len({tuple(scale.tolist()) for scale in scales}) == 3
    assert len({node.args[0].args[0] for node in heads}) == 1


def test_conv_net_is_no_worse_than_unsplit(split, x86, quantize, nets, images, sqnr):
    model = nets.residual()
    reference = model(images)
    plain = sqnr(reference, quantize(copy.deepcopy(model), x86(), images)(images))
    parts = sqnr(reference, quantize(copy.deepcopy(model), split() + x86(), images)(images))
    assert parts > plain - 1


def test_batchnorm_is_folded_before_the_split(split, quantize, nets, images, count):
    graph = quantize(nets.residual(), split() + LowBitWeightQuantizer("int8"), images)
    assert not count(graph)["batch_norm"]
    assert manifest_of(graph).split[0].name == "stem"


class GlobalQuantizer(Quantizer):
    """Annotates like a quantizer whose global mode quantizes every output: layers, additions and relus alike."""

    def annotate(self, model):
        act = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-12),
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
        )
        weight = QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        for node in model.graph.nodes:
            if node.target in (aten.linear.default, aten.conv2d.default):
                inputs = {node.args[0]: act, node.args[1]: weight}
            elif node.target in (aten.add.Tensor, aten.relu.default, operator.add):
                inputs = dict.fromkeys(node.all_input_nodes, act)
            else:
                continue
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=inputs, output_qspec=act, _annotated=True
            )
        return model

    def validate(self, model):
        pass


def test_global_mode_quantizes_what_it_did_and_the_last_sum_only(split, quantize, nets, images, count):
    plain = count(quantize(nets.residual(), GlobalQuantizer(), images))
    graph = quantize(nets.residual(), split() + GlobalQuantizer(), images)
    assert count(graph)["quantize_per_tensor"] == plain["quantize_per_tensor"]
    adds = [node for node in graph.graph.nodes if node.target == aten.add.Tensor]
    quantized = [any("quantize_per_tensor" in str(user.target) for user in node.users) for node in adds]
    assert sum(quantized) == 4  # stem, body, the model's own addition, head
    assert len(adds) == 3 * 2 + 1


def test_transform_and_validate_of_the_quantizer_run(split, quantize, nets, images):
    calls = []

    class Watching(GlobalQuantizer):
        def transform_for_annotation(self, model):
            calls.append("transform")
            return model

        def validate(self, model):
            calls.append(sum(node.target == aten.conv2d.default for node in model.graph.nodes))

    quantize(nets.residual(), split() + Watching(), images)
    assert calls == ["transform", 6]


class DerivedBias(GlobalQuantizer):
    """Derives the scale of a bias from those of input and weight, as integer-only targets do."""

    def annotate(self, model):
        from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec

        super().annotate(model)

        def derive(observers):
            (act, _), (weight, _) = (observer.calculate_qparams() for observer in observers)
            scale = act * weight
            return scale, torch.zeros_like(scale, dtype=torch.int32)

        for node in model.graph.nodes:
            if node.target == aten.conv2d.default:
                node.meta["quantization_annotation"].input_qspec_map[node.args[2]] = DerivedQuantizationSpec(
                    derived_from=[(node.args[0], node), (node.args[1], node)],
                    derive_qparams_fn=derive,
                    dtype=torch.int32,
                    quant_min=-(2**31),
                    quant_max=2**31 - 1,
                    qscheme=torch.per_channel_symmetric,
                    ch_axis=0,
                )
        return model


def test_derived_bias_scales_follow_the_parts(split, quantize, nets, images, count):
    plain = quantize(nets.residual(), DerivedBias(), images)
    with pytest.warns(SplitQuantWarning, match="cost more than the split gains in 3 of 3 layers"):
        graph = quantize(nets.residual(), split(splitter="kmeans") + DerivedBias(), images)
    assert count(graph)["dequantize_per_channel"] == 3 * count(plain)["dequantize_per_channel"]
    for node in graph.graph.nodes:
        if node.target == aten.conv2d.default:
            x, weight, bias = node.args[:3]
            scale = x.args[1] * getattr(graph, weight.args[1].target)
            torch.testing.assert_close(getattr(graph, bias.args[1].target), scale)


def test_shared_scales_follow_the_last_sum(split, quantize, count):
    """A pool that shares the scale of a convolution's output shares that of the sum."""
    from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

    class Sharing(GlobalQuantizer):
        def annotate(self, model):
            super().annotate(model)
            for node in model.graph.nodes:
                if node.target == aten.avg_pool2d.default:
                    conv = node.args[0]
                    conv.meta["quantization_annotation"].output_qspec = None
                    act = conv.meta["quantization_annotation"].input_qspec_map[conv.args[0]]
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={conv: act}, output_qspec=SharedQuantizationSpec((conv, node)), _annotated=True
                    )
            return model

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2))
    graph = quantize(model, split() + Sharing(), torch.randn(2, 3, 8, 8))
    pool = next(node for node in graph.graph.nodes if node.target == aten.avg_pool2d.default)
    (after,) = pool.users
    assert after.args[1:3] == pool.args[0].args[1:3]  # scale and zero point
    assert pool.args[0].args[0].args[0].target == aten.add.Tensor
    assert count(graph)["quantize_per_tensor"] == 3


def test_layers_that_the_recipe_leaves_are_left(split, x86, quantize, nets, images):
    recipe = (split() + x86()).set_module_name_qconfig("body", None)
    manifest = manifest_of(quantize(nets.residual(), recipe, images))
    assert {record.name: record.reason for record in manifest.kept} == {"body": "the recipe does not quantize it"}
    assert [record.name for record in manifest.split] == ["stem", "head"]


def test_patterns_take_the_models_names(split, quantize, nets, images):
    graph = quantize(nets.residual(), split(include=["*ody", "head"], exclude="head") + LowBitWeightQuantizer(), images)
    assert [record.name for record in manifest_of(graph).split] == ["body"]
    with pytest.raises(ConfigError, match="matches no layer"):
        quantize(nets.residual(), split(include="boddy") + LowBitWeightQuantizer(), images)


def test_second_split_is_refused(split, quantize, export, nets, images):
    with pytest.raises(ConfigError, match="attached already"):
        split() + (split() + LowBitWeightQuantizer())
    graph = export(nets.residual(), images)
    prepare_pt2e(graph, split() + LowBitWeightQuantizer())
    with pytest.raises(AlreadySplitError, match="split before"):
        prepare_pt2e(graph, split() + LowBitWeightQuantizer())
    with pytest.raises(AlreadySplitError, match="split before"):
        quantize(split()(nets.residual()), split() + LowBitWeightQuantizer(), images)


def test_quantized_graph_is_refused(split, quantize, nets, images):
    graph = quantize(nets.residual(), LowBitWeightQuantizer(), images)
    with pytest.raises(AlreadyQuantizedError, match="quantized"):
        prepare_pt2e(graph, split() + LowBitWeightQuantizer())


def test_nothing_to_split_is_an_error_and_nothing_to_gain_a_warning(split, quantize):
    with pytest.raises(InputError, match="no Linear or convolution"):
        quantize(nn.ReLU(), split() + GlobalQuantizer(), torch.randn(2, 3))
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.constant_(model[0].weight, 0.5)
    with pytest.warns(SplitQuantWarning, match="no layer of the graph was split"):
        quantize(model, split() + GlobalQuantizer(), torch.randn(2, 3))


def test_passes_that_do_not_go_together_are_refused(split, quantize, nets, images):
    with pytest.raises(ConfigError, match="activations=True goes with a single SplitQuantPass"):
        PassSequence([split(activations=True), split()]) + LowBitWeightQuantizer()
    with pytest.raises(AlreadySplitError, match="split before"):
        quantize(nets.residual(), PassSequence([split(), split()]) + LowBitWeightQuantizer("int4"), images)


def test_composed_quantizers(split, nets, images, quantize, count):
    from torchao.quantization.pt2e.quantizer import ComposableQuantizer

    plain = count(quantize(nets.residual(), ComposableQuantizer([LowBitWeightQuantizer("int4")]), images))
    parts = quantize(nets.residual(), split() + ComposableQuantizer([LowBitWeightQuantizer("int4")]), images)
    assert count(parts)["dequantize_per_channel"] == 3 * plain["dequantize_per_channel"]


@pytest.mark.filterwarnings("ignore:.*lose by their split")
def test_splitter_gets_the_grid_of_the_recipe(pt2e_plugins, x86, quantize, nets, images):
    from splitquant_plugins import SplitQuantPass, Splitter, hookimpl

    seen = {}

    class Greedy(Splitter):
        needs_grid = True
        always_splits = True

        def split(self, tensor, plan, grid):
            seen[plan.layer, plan.role] = grid
            rounded = grid.quantize_dequantize(tensor)
            return [rounded, tensor - rounded]

    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("greedy", Greedy, "made by a test")

    pt2e_plugins.add(Plugin(), "greedy")
    greedy = SplitQuantPass(plugins=pt2e_plugins, splitter="greedy")
    quantizer = LowBitWeightQuantizer("int2", granularity="tensor", scheme="symmetric")
    graph = quantize(nets.mlp(), greedy + quantizer, torch.randn(2, 12))
    assert set(seen.values()) == {quantizer.grid}
    assert len(stored_weights(graph)["0"]) == 2
    quantize(nets.residual(), greedy + x86(), images)
    weight = seen["body", "weight"]
    assert (weight.quant_min, weight.quant_max, weight.eps) == (-128, 127, 2**-12)

    class Unfit(PerChannelMinMaxObserver):
        def forward(self, x):
            raise RuntimeError("made for activations")

    class Strange(GlobalQuantizer):
        def annotate(self, model):
            super().annotate(model)
            for node in model.graph.nodes:
                if node.target == aten.linear.default:
                    inputs = node.meta["quantization_annotation"].input_qspec_map
                    inputs[node.args[1]] = replace(inputs[node.args[1]], observer_or_fake_quant_ctr=Unfit)
            return model

    with pytest.raises(
        ConfigError, match=r"cannot be inferred from how .* observes head\.weight: .* made for activations"
    ):
        quantize(nets.residual(), greedy + Strange(), images)


def test_runs_exported_again_and_saved(split, x86, quantize, nets, images, tmp_path):
    graph = quantize(nets.residual(), split() + x86(), images)
    expected = graph(images)
    again = torch.export.export(graph, (images,))
    torch.export.save(again, tmp_path / "graph.pt2")
    assert torch.equal(torch.export.load(tmp_path / "graph.pt2").module()(images), expected)


def test_dynamic_quantization(split, x86, quantize, nets, count):
    x = torch.randn(4, 12)
    plain = count(quantize(nets.mlp(), x86(is_dynamic=True), x))
    parts = count(quantize(nets.mlp(), split() + x86(is_dynamic=True), x))
    assert parts["dequantize_per_channel"] == 3 * plain["dequantize_per_channel"] == 9
    assert parts["quantize_per_tensor"] == plain["quantize_per_tensor"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own copy of an exported graph
def test_prepared_graph_can_be_copied(split, nets, images, export):
    prepared = prepare_pt2e(export(nets.residual(), images), split() + LowBitWeightQuantizer("int4"))
    twin = copy.deepcopy(prepared)
    for graph in (prepared, twin):
        graph(images)
    assert torch.equal(convert_pt2e(prepared)(images), convert_pt2e(twin)(images))


@torch.no_grad()
def test_integer_parts_quantizes_what_parts_give(split, x86, quantize, nets, count, sqnr):
    model, inputs = nets.mlp(), torch.randn(32, 12)
    usual = count(quantize(model, split() + x86(), inputs))["quantize_per_tensor"]
    graph = quantize(model, integer_parts(split() + x86()), inputs)
    assert count(graph)["quantize_per_tensor"] == usual + 9
    scales = {node.args[1] for node in graph.graph.nodes if ".quantize_per_tensor" in str(node.target)}
    assert len(scales) == usual + 9
    assert sqnr(model(inputs), graph(inputs)) > 25
    dynamic = split() + x86(is_dynamic=True)
    assert count(quantize(model, integer_parts(dynamic), inputs)) == count(quantize(model, dynamic, inputs))
    with pytest.raises(ConfigError, match="there are no parts without a pass"):
        integer_parts(x86())
