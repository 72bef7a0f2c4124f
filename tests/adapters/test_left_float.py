"""Layers that are to stay float stay float and whole, in every backend, and no others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.backends import WeightRequest, quantize_leaving
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.evaluation.metrics import linear_weights
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend

pytest.importorskip("transformers")
NEEDS = {
    "inc": "neural_compressor.torch",
    "quanto": "optimum.quanto",
    "pt2e": "torchao.quantization.pt2e",
    "simulated": "torch",
}


@pytest.mark.filterwarnings("ignore")  # of the backends
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", NEEDS)
def test_layers_left_float(name: str, split: bool, models: Any, plugins: Any, tokens: torch.Tensor) -> None:
    pytest.importorskip(NEEDS[name])
    backend = plugins.backend(name)
    form = backend.resolve(WeightRequest("int4"))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    kept = ("bert.encoder.layer.0.output.dense", "classifier")
    weights = {layer: weight.clone() for layer, weight in linear_weights(models.bert()).items()}
    for ignore in (kept, ()):
        first = SplitQuantPass(splitter="kmeans", k=2, plugins=plugins) if split else None
        quantized = backend.quantize(models.bert(), form, first, [batch], ignore=ignore)
        assert set(quantized.layers) == set(weights) - set(ignore)
        assert quantized.run(batch).shape == (4, 2)
        if quantized.manifest is not None:
            assert {record.name for record in quantized.manifest.split} == set(quantized.layers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantizer", ["x86-inductor", "xnnpack"])
def test_stock_quantizers_leave_layers_float_too(quantizer: str, models: Any, plugins: Any, tokens: Any) -> None:
    pytest.importorskip("torchao.quantization.pt2e")
    backend = plugins.backend("pt2e")
    if quantizer in backend.stock_quantizers().missing:
        pytest.skip(f"{quantizer} is not installed")
    form = backend.resolve(WeightRequest("", quantizer=quantizer))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    quantized = backend.quantize(models.bert(), form, None, [batch], ignore=("classifier",))
    assert "classifier" not in quantized.layers
    assert len(quantized.layers) > 5


def test_a_backend_that_leaves_nothing_float_is_refused_where_it_has_to(models: Any, plugins: Any) -> None:
    class Narrow(SimulatedBackend):
        name = "narrow"

        def quantize(self, model, chosen, first=None, batches=()):  # type: ignore[override]
            return super().quantize(model, chosen, first, batches)

    class Deaf(SimulatedBackend):
        name = "deaf"

        def quantize(self, model, chosen, first=None, batches=(), ignore=None):
            return super().quantize(model, chosen, first, batches)

    form = Narrow().resolve(WeightRequest("int4"))
    assert "classifier" in quantize_leaving(Narrow(), models.bert(), form, None, [], ()).layers
    assert "classifier" in quantize_leaving(Narrow(), models.bert(), form, None, [], None).layers
    with pytest.raises(ConfigError, match="backend narrow cannot leave classifier float"):
        quantize_leaving(Narrow(), models.bert(), form, None, [], ("classifier",))
    with pytest.raises(InputError, match="backend deaf quantized classifier, which was to stay float"):
        quantize_leaving(Deaf(), models.bert(), form, None, [], ("classifier",))
