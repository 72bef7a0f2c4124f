"""quanto as a backend of the command line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError
from splitquant_plugins.modules import SplitLinear

quanto = pytest.importorskip("optimum.quanto")


@pytest.fixture
def backend(plugins):
    return plugins.backend("quanto")


def quantize(backend, model, weights="int4", first=None):
    return backend.quantize(model, backend.resolve(WeightRequest(weights)), first)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
@pytest.mark.parametrize("split", [False, True])
def test_a_quantized_model_runs_and_says_what_it_stores(backend, plugins, models, tokens, weights, split):
    model = models.bert()
    reference = copy.deepcopy(model)
    result = quantize(backend, model, weights, SplitQuantPass(plugins=plugins, splitter="residual") if split else None)
    assert len(result.layers) == 14
    assert result.layers_quantized == (42 if split else 14)
    bits = int(weights[3:])
    for name, parts in result.layers.items():
        weight = reference.get_submodule(name).weight
        assert all(part.weight.shape == weight.shape for part in parts)
        assert all(part.bits >= weight.numel() * bits for part in parts)
    total = sum(part.bits for parts in result.layers.values() for part in parts)
    ideal = sum(reference.get_submodule(name).weight.numel() * bits for name in result.layers)
    assert total >= (3 if split else 1) * ideal
    assert result.run({"input_ids": tokens}).shape == (4, 2)
    assert (result.manifest is not None) is split
    assert (result.split_seconds > 0) is split
    assert result.state_bytes > total / 8


@torch.no_grad()
def test_a_split_is_closer_than_none(backend, plugins, models):
    reference = models.bert()
    errors = []
    for first in (None, SplitQuantPass(plugins=plugins)):
        layers = quantize(backend, copy.deepcopy(reference), "int2", first).layers
        errors.append(
            sum(
                float((sum(part.weight for part in parts) - reference.get_submodule(name).weight).square().sum())
                for name, parts in layers.items()
            )
        )
    assert errors[1] < errors[0] / 2


def test_convolutions(backend, plugins, models, images):
    reference = models.resnet()
    result = quantize(backend, copy.deepcopy(reference), "int8", SplitQuantPass(plugins=plugins))
    assert all(len(parts) == 3 for parts in result.layers.values())
    with torch.no_grad():
        expected = reference(images).logits
        assert torch.allclose(result.run({"pixel_values": images}), expected, atol=0.05 * float(expected.abs().max()))


def test_what_quanto_does_not_quantize_is_not_split(backend, plugins):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)

    result = quantize(backend, Net(), "int4", SplitQuantPass(plugins=plugins))
    assert type(result.model.conv) is nn.Conv1d
    assert result.manifest.kept[0].reason == "the recipe does not quantize it"
    assert list(result.layers) == ["linear"]


def test_a_root_layer(backend, plugins):
    result = quantize(backend, nn.Linear(8, 4), "int4", SplitQuantPass(plugins=plugins))
    assert isinstance(result.model, SplitLinear)
    assert result.layers_quantized == 3


def test_a_model_without_layers_is_an_error(backend):
    with pytest.raises(InputError, match="no layer to quantize in LayerNorm"):
        quantize(backend, nn.LayerNorm(4))


def test_activations_are_refused(backend, plugins, models):
    model = models.mlp()
    with pytest.raises(ConfigError, match="weights only"):
        quantize(backend, model, "int4", SplitQuantPass(plugins=plugins, activations=True))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (WeightRequest("int3"), "no weights 'int3': choose from int2, int4, int8"),
        (WeightRequest("int2", granularity="tensor"), "no granularity 'tensor' at int2: choose from channel"),
        (WeightRequest("int2", scheme="symmetric"), "no scheme 'symmetric' at int2: choose from affine"),
        (WeightRequest("int8", scheme="affine"), "no scheme 'affine' at int8: choose from symmetric"),
        (WeightRequest("int4", group_size=32), "group_size=32"),
    ],
)
def test_requests_it_cannot_meet(backend, request_, problem):
    with pytest.raises(ConfigError, match=problem):
        backend.resolve(request_)


def test_gaps_are_filled(backend):
    chosen = backend.resolve(WeightRequest("int2"))
    assert (chosen.bits, chosen.granularity, chosen.group_size, chosen.scheme) == (2, "channel", None, "affine")
    assert backend.grid(chosen).bits == 2


def test_its_packages_are_named_where_they_are_missing(backend, monkeypatch):
    backend.require()
    monkeypatch.setattr(type(backend), "packages", ("no-such-package",))
    with pytest.raises(MissingExtraError, match=r"needs no-such-package.*\[quanto\]"):
        backend.require()


def test_saving_and_loading(backend, plugins, models, tokens, tmp_path):
    result = quantize(backend, models.bert(), "int2", SplitQuantPass(plugins=plugins, splitter="residual"))
    backend.save(result, tmp_path)
    with torch.no_grad():
        assert torch.equal(backend.load(tmp_path)(tokens).logits, result.model(tokens).logits)


@pytest.mark.parametrize("split", [False, True])
def test_rows_that_torchs_int4_kernel_cannot_hold_are_an_error_that_names_the_layer(backend, plugins, split):
    def model(outputs, dtype=torch.bfloat16):
        return nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 256), nn.Linear(256, outputs)).to(dtype)

    first = SplitQuantPass(plugins=plugins, splitter="residual") if split else None
    unfit = model(24)
    with pytest.raises(ConfigError, match=r"^3: .*multiple of 16 outputs, not 24"):
        quantize(backend, unfit, "int4", first)
    assert not any(isinstance(module, SplitLinear) for module in unfit.modules())
    for fits in (model(32), model(24, torch.float32)):
        assert quantize(backend, fits, "int4", first).layers_quantized == (9 if split else 3)
    assert quantize(backend, model(24), "int2", first).layers_quantized == (9 if split else 3)
