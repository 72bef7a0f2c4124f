"""The figures of `compare`, on numbers small enough to work out by hand."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from splitquant_plugins.backends import QuantizedModel, StoredWeight
from splitquant_plugins.evaluation.metrics import (
    LayerMeasures,
    linear_weights,
    measure_weights,
    ratio_db,
    sqnr_db,
    tokenize,
)


def float_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(1, 1, 3), nn.LayerNorm(7))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[[1.0, 2.0, 2.0]]]))
    return model


def quantized_as(layers: dict[str, list[StoredWeight]]) -> QuantizedModel:
    return QuantizedModel(nn.Module(), lambda batch: torch.zeros(1, 2), layers, state_bytes=77)


def test_measures_of_a_model_of_which_one_layer_is_quantized_in_two_parts() -> None:
    parts = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, -2.5], [0.0, 4.5]])]
    quantized = quantized_as({"0": [StoredWeight(part, bits) for part, bits in zip(parts, (11, 6), strict=True)]})
    found = measure_weights(quantized, float_model())
    assert found.weight_sqnr_db == pytest.approx(10 * math.log10((1 + 4 + 9 + 16) / (0.25 + 0.25)))
    assert found.linear_bits_per_weight == (17 + 3 * 32) / 7
    assert found.linear_bytes == math.ceil((17 + 3 * 32) / 8)
    assert found.model_bytes == 77
    assert found.layers_quantized == 2
    assert found.layers == (LayerMeasures("0", pytest.approx(10 * math.log10(30 / 0.5)), 17 / 4),)


def test_weights_are_put_together_over_all_layers() -> None:
    layers = {
        "0": [StoredWeight(torch.tensor([1.0, -2.0, 3.0, 5.0]), 8)],
        "2": [StoredWeight(torch.tensor([[[1.0, 2.0, 4.0]]]), 6)],
    }
    found = measure_weights(quantized_as(layers), float_model())
    assert found.weight_sqnr_db == pytest.approx(10 * math.log10((30 + 9) / (1 + 4)))
    assert found.linear_bits_per_weight == 2.0
    assert (found.linear_bytes, found.layers_quantized) == (2, 2)
    first, second = (
        LayerMeasures(name, pytest.approx(10 * math.log10(r)), 2.0) for name, r in (("0", 30), ("2", 9 / 4))
    )
    assert found.layers == (first, second)


def test_a_layer_that_stays_float_counts_with_the_bits_of_its_dtype() -> None:
    found = measure_weights(quantized_as({}), float_model().half())
    assert found.linear_bits_per_weight == 16
    assert found.linear_bytes == 14
    assert found.weight_sqnr_db == 300.0


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 10.0, -10.0),
        (1.0, 0.0, 300.0),
        (0.0, 0.0, 300.0),
        (0.0, 1.0, -300.0),
        (1.0, math.inf, -300.0),
        (1.0, math.nan, -300.0),
        (1e-300, 1e300, -300.0),
        (1e300, 1e-300, 300.0),
        (2e29, 1.0, 293.010299957),
        (1.0, 2e29, -293.010299957),
        (1e300, 2.0, 296.989700043),
    ],
)
def test_ratios_are_cut_so_that_json_can_hold_them(signal: float, noise: float, expected: float) -> None:
    if (signal, noise) == (1e300, 2.0):
        expected = 300.0
    assert ratio_db(signal, noise) == pytest.approx(expected)


def test_the_ratio_of_tensors_is_in_float64() -> None:
    reference = torch.tensor([3.0e30, 4.0e30])
    assert sqnr_db(reference, reference * torch.tensor([1.0, 0.0])) == pytest.approx(10 * math.log10(25 / 16))


def test_texts_are_tokenized_in_batches_padded_and_cut() -> None:
    seen = []

    def tokenizer(texts: list[str], **options: object) -> dict[str, list[str]]:
        seen.append(options)
        return {"texts": texts}

    found = tokenize(tokenizer, [str(number) for number in range(5)], 17, batch_size=2)
    assert found == [{"texts": ["0", "1"]}, {"texts": ["2", "3"]}, {"texts": ["4"]}]
    assert seen == [{"padding": True, "truncation": True, "max_length": 17, "return_tensors": "pt"}] * 3
    assert [len(batch["texts"]) for batch in tokenize(tokenizer, ["a"] * 200, 5)] == [128, 72]


def test_the_layers_that_are_measured() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.Embedding(3, 3), nn.LayerNorm(2))
    assert list(linear_weights(model)) == ["0", "1", "2"]
    assert not any(weight.requires_grad for weight in linear_weights(model).values())


def test_weights_that_are_stored_transposed_are_measured_with_outputs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))

    model = nn.Sequential(Conv1D(), nn.Linear(2, 3, bias=False))
    assert list(linear_weights(model)) == ["1"]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", SimpleNamespace(Conv1D=Conv1D))
    weights = linear_weights(model)
    assert weights["0"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(weights["1"], model[1].weight)
    assert not weights["0"].requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_a_convolution_is_measured_against_the_folded_weight_where_that_is_what_is_stored(scale: float) -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.BatchNorm1d(2, eps=0), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(scale * torch.tensor([[[1.0]], [[-2.0]]]))
        model[1].weight.copy_(torch.tensor([3.0, 0.5]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    linear = StoredWeight(model[2].weight.detach() * 2, 4)
    for stored, expected in (
        (torch.tensor([[1.0], [-2.0]]), 300.0),
        (torch.tensor([[3.0], [-1.0]]), 300.0),
        (torch.tensor([[3.0], [-1.5]]), 10 * math.log10(10 / 0.25)),
        (torch.tensor([[1.0], [-2.5]]), 10 * math.log10(5 / 0.25)),
        (torch.tensor([[2.0], [-1.5]]), 10 * math.log10(10 / 1.25)),  # as far from both, and the folded one is larger
    ):
        found = measure_weights(quantized_as({"0": [StoredWeight(scale * stored, 4)], "2": [linear]}), model)
        assert found.layers[0].weight_sqnr_db == pytest.approx(expected, rel=1e-4)
        assert found.layers[1].weight_sqnr_db == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_of_zeros_have_a_ratio_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    for stored, expected in ((torch.zeros(2, 2), 300.0), (torch.ones(2, 2), -300.0)):
        assert measure_weights(quantized_as({"0": [StoredWeight(stored, 4)]}), model).weight_sqnr_db == expected
