"""ClipPass through every backend: what it stores has the errors that the manifest says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitquant_plugins import ClipPass, manifest_of
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.testing import small_batch, small_classifier

NEEDS = {"inc": "neural_compressor.torch", "quanto": "optimum.quanto", "pt2e": "torchao.quantization.pt2e"}


def squared_errors(quantized):
    whole = small_classifier()
    return {
        layer: float((stored.weight - whole.get_submodule(layer).weight).square().sum())
        for layer, (stored,) in quantized.layers.items()
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inc", {}),
        ("inc", {"granularity": "group", "group_size": 32}),
        ("inc", {"scheme": "symmetric"}),
        ("quanto", {}),
        ("pt2e", {"granularity": "tensor"}),
        ("simulated", {"granularity": "tensor", "scheme": "symmetric"}),
    ],
)
@torch.no_grad()
def test_the_backend_stores_the_clipped_weight(name, options, plugins, tmp_path):
    pytest.importorskip(NEEDS.get(name, "torch"))
    backend = plugins.backend(name)
    form = backend.resolve(WeightRequest("int2", **options))
    plain = squared_errors(backend.quantize(small_classifier(), form, None, [small_batch()]))
    quantized = backend.quantize(small_classifier(), form, ClipPass(plugins=plugins), [small_batch()])
    clippings = {record.name: record.clipping for record in quantized.manifest.layers if record.clipping is not None}
    assert set(clippings) == set(plain)
    for layer, error in squared_errors(quantized).items():
        assert clippings[layer].error_before == pytest.approx(plain[layer], rel=1e-3), layer
        assert clippings[layer].error_after == pytest.approx(error, rel=1e-3), layer
        assert error < plain[layer]
    if name == "simulated":
        return
    expected = quantized.run(small_batch())
    backend.save(quantized, tmp_path)
    loaded = backend.load(tmp_path)
    output = loaded(**small_batch())
    assert torch.equal(getattr(output, "logits", output), expected)
    assert manifest_of(loaded) == quantized.manifest


def test_on_an_exported_graph_the_quantizer_rounds_what_was_clipped():
    pytest.importorskip(NEEDS["pt2e"])
    from splitquant_pt2e import LowBitWeightQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model = nn.Sequential(nn.Linear(24, 16)).eval()
    with torch.no_grad():
        model[0].weight.mul_(model[0].weight.abs() * 10)
    x = torch.eye(24)  # outputs are the weight's columns

    def error(first):
        graph = torch.export.export(model, (x,)).module()
        quantizer = LowBitWeightQuantizer("int2", granularity="tensor")
        prepared = prepare_pt2e(graph, quantizer if first is None else first + quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
        return float((converted(x) - model(x)).detach().square().sum()), converted

    plain, _ = error(None)
    clipped, converted = error(ClipPass())
    (found,) = [record.clipping for record in manifest_of(converted).layers if record.clipping is not None]
    assert found.error_before == pytest.approx(plain, rel=1e-3)
    assert found.error_after == pytest.approx(clipped, rel=1e-3)
    assert clipped < plain


def test_a_recipe_without_a_known_grid_is_refused():
    pytest.importorskip(NEEDS["inc"])
    from neural_compressor.torch.quantization import HQQConfig, convert, prepare

    with pytest.raises(ConfigError, match="such as HQQ, leave it out"):
        convert(prepare(small_classifier(), ClipPass() + HQQConfig(bits=2, group_size=32, quant_zero=False)))
