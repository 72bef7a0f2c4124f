"""INC as a backend of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError
from splitquant_plugins.modules import SplitLinear


@pytest.fixture
def backend(plugins):
    return plugins.backend("inc")


def run(backend, model, first=None, **request):
    return backend.quantize(model, backend.resolve(WeightRequest(**request)), first)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
@pytest.mark.parametrize("split", [False, True])
def test_what_is_stored(backend, models, tokens, split_pass, weights, split):
    torch.manual_seed(5)
    model = models.bert()
    floats = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    result = run(backend, model, split_pass() if split else None, weights=weights)
    assert result.layers.keys() == floats.keys()
    assert result.layers_quantized == (42 if split else 14)
    chosen = backend.resolve(WeightRequest(weights))
    for name, parts in result.layers.items():
        assert all(part.weight.shape == floats[name].shape for part in parts)
        bits = backend.grid(chosen).stored_bits(floats[name].shape)
        assert [part.bits for part in parts] == [bits] * len(parts)
        layer = result.model.get_submodule(name)
        held = layer.parts() if isinstance(layer, SplitLinear) else [layer]
        assert all(torch.equal(p.weight, m.recover().float()) for p, m in zip(parts, held, strict=True))
    assert result.run({"input_ids": tokens}).shape == (4, 2)
    assert (result.manifest is not None) == split
    assert (result.split_seconds > 0) == split
    assert result.quantize_seconds > 0


def test_defaults_and_refusals(backend):
    assert backend.resolve(WeightRequest("int2")).scheme == backend.resolve(WeightRequest("int4")).scheme == "affine"
    assert backend.resolve(WeightRequest("int8")).scheme == "symmetric"
    assert backend.resolve(WeightRequest("int4", "group")).group_size == 32
    assert backend.resolve(WeightRequest("int4", "group", 7)).group_size == 7
    for request in ({"scheme": "affine"}, {"granularity": "tensor"}):
        with pytest.raises(ConfigError):
            backend.resolve(WeightRequest("int8", **request))


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_groups(backend, models, scheme):
    weight = (model := models.mlp())[2].weight.detach().clone()
    result = run(backend, model, weights="int4", granularity="group", group_size=6, scheme=scheme)
    grid = backend.grid(backend.resolve(WeightRequest("int4", "group", 6, scheme)))
    assert torch.equal(result.layers["2"][0].weight, grid.quantize_dequantize(weight))


@torch.no_grad()
@pytest.mark.parametrize("split", [False, True])
def test_transposed_weights_keep_their_shape(backend, models, split_pass, split):
    model = models.gpt2()
    shapes = {name: m.weight.shape for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    result = run(backend, model, split_pass() if split else None, weights="int4")
    assert result.layers.keys() == shapes.keys()
    assert all(part.weight.shape == shapes[name] for name, parts in result.layers.items() for part in parts)


def test_quantizing_nothing_is_an_error(backend, split_pass):
    convolution = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises((ConfigError, InputError)):
        run(backend, convolution, weights="int4")
    with pytest.raises((ConfigError, InputError)):
        run(backend, convolution, split_pass(), weights="int4")


@torch.no_grad()
def test_save_load_and_size(backend, models, tokens, split_pass, tmp_path):
    result = run(backend, models.bert(), split_pass(), weights="int2")
    expected = result.run({"input_ids": tokens})
    backend.save(result, tmp_path)
    assert torch.equal(backend.load(tmp_path)(tokens).logits, expected)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert result.state_bytes == len(content) - header


def test_either_distribution_will_do(backend, monkeypatch):
    from importlib import metadata

    from splitquant_inc import backend as module

    found = set(module.DISTRIBUTIONS)

    def version(name):
        if name in found:
            return "3.10"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    for name in module.DISTRIBUTIONS:
        found = {name}
        backend.require()
    found = set()
    with pytest.raises(MissingExtraError, match=r"splitquant-plugins\[inc\]"):
        backend.require()


def test_the_plugin_imports_neither_torch_nor_inc(python_path):
    script = """
import sys, splitquant_inc, splitquant_inc.plugin
assert not {"torch", "neural_compressor"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], env=python_path(), check=True)
