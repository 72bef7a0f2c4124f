"""Each chunk of a split activation has its own scale, and the concatenation is not quantized again."""

from __future__ import annotations

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, chunk_scales, split_graph
from splitquant_pt2e.activations import ELEMENTWISE
from torch import nn

from splitquant_plugins import manifest_of

aten = torch.ops.aten


def three_ranges() -> nn.Sequential:
    """A layer whose thirds of outputs differ a hundredfold, so that one scale fits them badly."""
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 5)).eval()
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[:10] *= 0.1
        model[0].weight[20:] *= 10
        model[2].weight[:, 20:] *= 0.01
    return model


def chunk_qparams(graph):
    """Scales and zero points of the chunks of the one concatenation."""
    cat = next(node for node in graph.graph.nodes if node.target == aten.cat.default)
    chunks = cat.args[0]
    assert all("dequantize_per_tensor" in str(chunk.target) for chunk in chunks)
    assert not any("quantize" in str(user.target) for user in cat.users)
    return [chunk.args[1:3] for chunk in chunks]


@pytest.mark.parametrize("recipe", ["ours", "x86"])
def test_three_chunks_have_three_scales(recipe, split, x86, quantize, sqnr):
    def make():
        return x86() if recipe == "x86" else LowBitWeightQuantizer("int8", activations="int8")

    model, x = three_ranges(), torch.randn(64, 12)
    graph = quantize(model, split(activations=True) + make(), x)
    scales = [scale for scale, _ in chunk_qparams(graph)]
    assert len(set(scales)) == 3
    assert scales[2] > 3 * scales[1] > 9 * scales[0]
    whole = quantize(model, split() + make(), x)
    assert sqnr(model(x), graph(x)) > sqnr(model(x), whole(x))


def test_graphs_of_models_split_before_export(split, x86, quantize):
    model, x = split(activations=True)(three_ranges()), torch.randn(64, 12)
    plain = quantize(model, x86(), x)
    cat = next(node for node in plain.graph.nodes if node.target == aten.cat.default)
    (user,) = {user for user in cat.users if "quantize" in str(user.target)}  # the stock quantizer: one scale
    del user
    scales = [scale for scale, _ in chunk_qparams(quantize(model, chunk_scales(x86()), x))]
    assert len(set(scales)) == 3


def test_convolutions_are_cut_along_channels(split, quantize, images):
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.SiLU(), nn.Conv2d(7, 4, 3))
    graph = quantize(model, split(activations=True) + LowBitWeightQuantizer(activations="int8"), images)
    assert len(chunk_qparams(graph)) == 3
    pieces = [node.args[1:] for node in graph.graph.nodes if node.target == aten.slice.Tensor]
    assert pieces == [(1, 0, 3), (1, 3, 5), (1, 5, 7)]
    assert "activation 1 (aten.silu.default) is split in 3 along 1" in manifest_of(graph).notes


@pytest.mark.parametrize("target", sorted(ELEMENTWISE, key=str), ids=str)
def test_function_is_kept(target, split, export):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.second(target(self.first(x)))

    x = torch.randn(3, 4)
    graph = export(Net(), x)
    expected = graph(x)
    manifest = split_graph(graph, split(activations=True))
    assert any("is split in 3" in note for note in manifest.notes)
    torch.testing.assert_close(graph(x), expected)


def test_what_stays_whole_is_noted(split, x86, quantize, export):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.narrow = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 2)

        def forward(self, x):
            x = x.relu()
            x = self.second(self.first(x).tanh())
            return self.narrow(x.relu()).sigmoid()

    x = torch.randn(3, 6)
    notes = manifest_of(quantize(Net(), split(activations=True) + LowBitWeightQuantizer(activations="int8"), x)).notes
    assert [note.partition(": ")[2] or note.partition(") ")[2] for note in notes] == [
        "no layer before it tells where its features are; give activation_dim",
        "is split in 3 along 1",
        "it has 2 features for 3 chunks",
        "it has 2 features for 3 chunks",
    ]
    weights_only = manifest_of(quantize(Net(), split(activations=True) + LowBitWeightQuantizer(), x)).notes
    assert weights_only[1].endswith("the recipe does not quantize it")


def test_shared_scales_are_left_alone(split, quantize):
    """A pool that shares the scale of the activation before it keeps sharing."""
    from splitquant_pt2e.compat import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec

    class Sharing(LowBitWeightQuantizer):
        def annotate(self, model):
            super().annotate(model)
            spec = next(
                value
                for node in model.graph.nodes
                for key, value in getattr(node.meta.get("quantization_annotation"), "input_qspec_map", {}).items()
                if key.op != "get_attr"
            )
            for node in model.graph.nodes:
                if node.target == aten.avg_pool2d.default:
                    relu = node.args[0]
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={relu: spec}, output_qspec=SharedQuantizationSpec((relu, node)), _annotated=True
                    )
            return model

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2))
    quantizer = split(activations=True) + Sharing(activations="int8")
    notes = manifest_of(quantize(model, quantizer, torch.randn(1, 3, 8, 8))).notes
    assert notes == [
        "activation 1 (aten.relu.default) is left whole: the recipe makes it share its scale with another place"
    ]
