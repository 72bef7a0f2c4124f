"""PT2E as a backend: every width, granularity and scheme; names, sizes, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from splitquant_pt2e.backend import Pt2eBackend
from torch import nn

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError, InputError


@pytest.fixture
def batch(tokens):
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_registered(pt2e_plugins):
    backend = pt2e_plugins.backend("pt2e")
    assert isinstance(backend, Pt2eBackend)
    backend.require()


def test_defaults_and_what_is_not_supported():
    backend = Pt2eBackend()
    chosen = backend.resolve(WeightRequest("int2"))
    assert (chosen.granularity, chosen.scheme) == ("channel", "affine")
    grid = backend.grid(chosen)
    assert (grid.quant_min, grid.quant_max) == (-2, 1)
    with pytest.raises(ConfigError, match="no granularity 'group'"):
        backend.resolve(WeightRequest("int4", granularity="group", group_size=32))


def test_quantize_save_and_load(split, nets, batch, tmp_path):
    model = nets.bert()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    backend = Pt2eBackend()
    chosen = backend.resolve(WeightRequest("int4"))
    plain = backend.quantize(copy.deepcopy(model), chosen, batches=[batch])
    parts = backend.quantize(copy.deepcopy(model), chosen, split(splitter="kmeans"), [batch])
    assert set(plain.layers) == set(parts.layers) == set(linears)
    assert (plain.layers_quantized, parts.layers_quantized) == (len(linears), 3 * len(linears))
    assert plain.manifest is None
    assert len(parts.manifest.split) == len(linears)
    grid = backend.grid(chosen)
    for name, (stored,) in plain.layers.items():
        weight = linears[name].weight.detach()
        assert torch.equal(stored.weight, grid.quantize_dequantize(weight))
        assert stored.bits == 8 * weight.numel() + weight.shape[0] * (32 + 32)

    def error(layers):
        return sum(
            float((sum(s.weight for s in held) - linears[name].weight.detach()).pow(2).sum())
            for name, held in layers.items()
            for n, parts in layers.items()
        )

    assert error(parts.layers) < error(plain.layers) / 2
    zeros = [(part.weight == 0).float().mean() for stored in parts.layers.values() for part in stored]
    assert min(zeros) > 0.1  # injected zeros stay zeros

    other = {key: value[:1, :7] for key, value in batch.items()}
    assert parts.run(other).shape == (1, 2)  # batch size and sequence length are free
    backend.save(parts, tmp_path)
    again = backend.load(tmp_path)
    for example in (batch, other):
        assert torch.equal(again(**example).logits, parts.run(example))


def test_example_is_needed(nets):
    backend = Pt2eBackend()
    with pytest.raises(InputError, match="example batch"):
        backend.quantize(nets.bert(), backend.resolve(WeightRequest("int8")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "choose from int2, int4, int8"),
        ({"granularity": "group"}, "per tensor or per channel only"),
        ({"scheme": "odd"}, "choose from affine, symmetric"),
        ({"symmetric_scale": "odd"}, "choose from restricted, full"),
        ({"activations": "int4"}, "choose from None, int8"),
    ],
)
def test_quantizer_options(options, message):
    from splitquant_pt2e import LowBitWeightQuantizer

    with pytest.raises(ConfigError, match=message):
        LowBitWeightQuantizer(**options)


def test_plugin_imports_neither_torch_nor_torchao(python_path):
    import subprocess
    import sys

    code = "import sys, splitquant_pt2e.plugin; assert not {'torch', 'torchao'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=python_path(), timeout=60)


def test_other_recipes_are_not_ours(pt2e_plugins):
    from splitquant_pt2e.plugin import splitquant_attach

    assert splitquant_attach(None, object()) is None


def test_a_parent_that_reads_a_split_weight_leaves_no_call_in_front_of_it(split, nets, images):
    """ViT asks its patch embedding for its weight's dtype, on the split layer, while the model is exported."""
    backend = Pt2eBackend()
    form = backend.resolve(WeightRequest("int4"))
    batch = {"pixel_values": images}
    quantized = backend.quantize(nets.vit(), form, split(splitter="grid", k=2, calibration=[batch]), [batch])
    assert "vit.embeddings.patch_embeddings.projection" in quantized.layers
    assert not [node for node in quantized.model.graph.nodes if node.target == torch.ops.aten.dequantize.self]


def test_models_of_fixed_sizes_are_refused_in_one_line():
    class Fixed(nn.Linear):
        def forward(self, input):
            return super().forward(input.reshape(3, 4))

    backend = Pt2eBackend()
    form = backend.resolve(WeightRequest("int8"))
    with pytest.raises(InputError, match="Sequential cannot be exported with a free batch size"):
        backend.quantize(nn.Sequential(Fixed(4, 4)), form, None, [{"input": torch.ones(3, 4)}])
