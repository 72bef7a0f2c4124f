"""The split of an exported graph: what is split, what it is called, and what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, split_graph, stored_weights
from torch import nn

from splitquant_plugins import UniformGrid, manifest_of
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError

aten = torch.ops.aten


@pytest.fixture
def check(split, export):
    """Split the graph of a model; compare the outputs and return the manifest and the graph."""

    def check_(model, *args, atol=1e-5, **options):
        graph = export(model, *args)
        expected = graph(*args)
        manifest = split_graph(graph, split(**options))
        assert float((graph(*args) - expected).detach().abs().max()) <= atol
        return manifest, graph

    return check_


def test_names_kinds_and_parts_are_those_of_the_module_pass(check, split, nets, images):
    model = nets.conv()
    manifest, graph = check(model, images, fold_batchnorm=False)
    by_module = manifest_of(split(fold_batchnorm=False)(copy.deepcopy(model)))
    ours = {record.name: record.model_dump(exclude={"seconds"}) for record in manifest.split}
    assert ours == {record.name: record.model_dump(exclude={"seconds"}) for record in by_module.split}
    assert manifest_of(graph) is manifest
    assert {"head.lower.weight", "head.upper.bias"} <= set(graph.state_dict())
    assert "head.weight" not in graph.state_dict()


def test_parts_sum_to_the_weight_bit_for_bit(check, nets, images):
    model = nets.conv()
    _, graph = check(model, images)
    state = graph.state_dict()
    for name in ("stem", "grouped", "depthwise", "head"):
        total = sum(state[f"{name}.{part}.weight"] for part in ("lower", "middle", "upper"))
        assert torch.equal(total, model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 8)),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 8)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 8)),
        (nn.Conv3d(2, 3, 3, dilation=2), (1, 2, 7, 7, 7)),
        (nn.Linear(8, 3, bias=False), (5, 8)),
    ],
    ids=["same", "grouped", "valid", "3d", "no-bias"],
)
def test_layer_types(check, quantize, split, layer, shape):
    model, x = nn.Sequential(layer), torch.randn(shape)
    manifest, _ = check(copy.deepcopy(model), x)
    assert manifest.split[0].shape == tuple(layer.weight.shape)
    stored = stored_weights(quantize(model, split() + LowBitWeightQuantizer("int8"), x))["0"]
    assert len(stored) == 3
    torch.testing.assert_close(sum(part.weight for part in stored), layer.weight.detach(), atol=0.02, rtol=0)


def test_aten_convolution(split):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))

        def forward(self, x):
            return aten.convolution(x, self.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2)

    x = torch.randn(1, 4, 5, 5)
    graph = torch.export.export(Plain(), (x,)).module()
    expected = graph(x)
    manifest = split_graph(graph, split())
    assert [(record.name, record.kind) for record in manifest.split] == [("weight", "conv2d")]
    torch.testing.assert_close(graph(x), expected)


def test_transposed_convolutions_and_computed_weights_stay(split, export):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 2)
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(self.up(x).mean((2, 3)), self.weight * 2))

    manifest = split_graph(export(Odd(), torch.randn(2, 3, 4, 4)), split())
    assert [record.name for record in manifest.split] == ["head"]
    assert [record.reason for record in manifest.kept] == [
        "transposed convolutions are not supported",
        "its weight is computed in the graph",
    ]


def test_multihead_attention(check, nets):
    x = torch.randn(2, 5, 8)
    manifest, _ = check(nets.attention(), x)
    assert [record.name for record in manifest.split] == ["attention.in_proj", "attention.out_proj"]
    manifest, _ = check(nets.encoder(), x)
    assert [record.name for record in manifest.split] == [
        "self_attn.in_proj",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]


def test_reused_and_tied_layers_share_their_parts(check, quantize, split, nets):
    x = torch.randn(2, 6)
    manifest, graph = check(nets.tied(), x)
    assert [(record.name, record.also_known_as, record.shared_with) for record in manifest.split] == [
        ("first", ("again",), None),
        ("twin", (), "first"),
    ]
    assert sum(name.endswith("weight") for name in graph.state_dict()) == 3
    assert sum(node.target == aten.linear.default for node in graph.graph.nodes) == 9
    converted = quantize(nets.tied(), split() + LowBitWeightQuantizer("int4"), x)
    assert len(stored_weights(converted)["first"]) == 3


def test_hugging_face_conv1d(split, export, quantize, nets, tokens, sqnr):
    model = nets.gpt2(use_cache=False)
    graph = export(model, input_ids=tokens)
    expected = graph(input_ids=tokens).logits
    manifest = split_graph(graph, split())
    assert {record.kind for record in manifest.split} == {"conv1d_hf"}
    assert [record.reason for record in manifest.kept] == [
        "its weight is that of embedding transformer.wte; untie_embeddings splits it"
    ]
    torch.testing.assert_close(graph(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
    converted = quantize(model, split() + LowBitWeightQuantizer("int8"), input_ids=tokens)
    assert sqnr(expected, converted(input_ids=tokens).logits) > 35
    weight = model.transformer.h[0].attn.c_attn.weight
    stored = stored_weights(converted)["transformer.h.0.attn.c_attn"]
    torch.testing.assert_close(sum(part.weight for part in stored), weight.t(), atol=2e-3, rtol=0)


def test_untied_embeddings_are_split_and_the_embedding_keeps_its_weight(split, export, nets, tokens):
    model = nets.gpt2(use_cache=False)
    graph = export(model, input_ids=tokens)
    manifest = split_graph(graph, split(untie_embeddings=True))
    assert "lm_head" in {record.name for record in manifest.split}
    torch.testing.assert_close(graph(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5, rtol=1e-4)


def test_dynamic_shapes_survive(split, nets):
    x = torch.randn(4, 12)
    graph = torch.export.export(nets.mlp(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    split_graph(graph, split())
    assert graph(torch.randn(7, 12)).shape == (7, 2)


def test_split_graph_can_be_exported_again_and_is_recognised(split, export, nets):
    x = torch.randn(4, 12)
    graph = export(nets.mlp(), x)
    split_graph(graph, split())
    again = export(graph, x)
    torch.testing.assert_close(again(x), graph(x))
    with pytest.raises(AlreadySplitError, match="split before"):
        split_graph(again, split())
    with pytest.raises(AlreadySplitError):
        split_graph(graph, split())


def test_sums_are_kept_from_a_quantizer_that_comes_later(split, export, nets, images):
    """Another tool may annotate the graph after split_graph: patterns skip nodes that are annotated already."""
    from splitquant_pt2e.annotation import annotation_of

    graph = export(nets.residual(), images)
    split_graph(graph, split())
    marked = [node for node in graph.graph.nodes if annotation_of(node) is not None]
    assert len(marked) == 3 * 2
    for node in marked:
        assert node.target == aten.add.Tensor
        assert annotation_of(node)._annotated
        assert not annotation_of(node).input_qspec_map
        assert annotation_of(node).output_qspec is None


def test_errors(split, export, nets):
    x = torch.randn(2, 12)
    with pytest.raises(InputError, match=r"exported\.module\(\)"):
        split_graph(torch.export.export(nets.mlp(), (x,)), split())
    with pytest.raises(InputError, match="not a Sequential"):
        split_graph(nets.mlp(), split())
    with pytest.raises(ConfigError, match="exclude pattern 'nope' matches no layer"):
        split_graph(export(nets.mlp(), x), split(exclude="nope"))
    broken = nets.mlp()
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"2\.weight has 1 NaN"):
        split_graph(export(broken, x), split())


def test_grid_rule_reaches_the_splitter(pt2e_plugins, export, nets):
    from splitquant_plugins import SplitQuantPass, Splitter, hookimpl

    class Needs(Splitter):
        needs_grid = True
        always_splits = True

        def split(self, tensor, plan, grid):
            assert grid.bits == 4
            return [tensor / 2, tensor / 2]

    class Plugin:
        @hookimpl
        def splitquant_register_splitters(self, register):
            register("needs", Needs, "made by a test")

    pt2e_plugins.add(Plugin(), "needs")
    needs = SplitQuantPass(plugins=pt2e_plugins, splitter="needs")
    graph = export(nets.mlp(), torch.randn(2, 12))
    with pytest.raises(ConfigError, match="pass a grid to split_graph"):
        split_graph(graph, needs)
    assert len(split_graph(graph, needs, lambda name: UniformGrid(4)).split) == 3
