"""The zero-exact optimizer: what an injected zero comes back as, on every path to a quantized part."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.modules import SplitModule

quanto = pytest.importorskip("optimum.quanto")

from splitquant_quanto import ZeroExactOptimizer  # noqa: E402
from splitquant_quanto.grid import group_size_of  # noqa: E402

QTYPES = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}
LOW = pytest.mark.parametrize("weights", ["qint2", "qint4"])


def rounded(tensor, bits, optimizer):
    size = group_size_of(tensor.shape[1:].numel(), bits)
    scale, shift = optimizer(tensor, qtype=QTYPES[bits], axis=0, group_size=size)
    qweight = quanto.quantize_weight(tensor, qtype=QTYPES[bits], axis=0, scale=scale, shift=shift, group_size=size)
    return qweight.dequantize(), scale


def parts_and_zeros(model, reference):
    """Pairs of what a part holds now, and where it was exactly 0 before quantization."""
    for name, module in model.named_modules():
        if isinstance(module, SplitModule):
            for part in module.part_names:
                before = reference.get_submodule(f"{name}.{part}").weight
                yield getattr(module, part).weight.dequantize(), before == 0


def quantized(model, weights, **options):
    quanto.quantize(model, weights=getattr(quanto, weights), **options)
    quanto.freeze(model)
    return model


class Net(nn.Sequential):
    """Linears, with rows whole and in groups of 32, 96 and 128, and a convolution."""

    def __init__(self) -> None:
        sizes = [8 * 36, 160, 256, 32, 2]
        linears = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        super().__init__(nn.Conv2d(3, 8, 3), nn.Flatten(), *linears)


@LOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_every_part_come_back_as_zero(plugins, weights, dtype):
    model = SplitQuantPass(plugins=plugins)(Net().to(dtype))
    reference = copy.deepcopy(model)
    model = quantized(model, weights)  # quanto's own functions, and no argument of ours
    checked = 0
    for held, zeros in parts_and_zeros(model, reference):
        assert bool((held[zeros] == 0).all())
        assert bool(torch.isfinite(held).all())
        assert bool((held != 0).any())
        checked += int(zeros.sum())
    assert checked > 2 * sum(layer.weight.numel() for layer in Net() if hasattr(layer, "weight")) * 0.99


@LOW
def test_zeros_come_back_as_zero_with_an_optimizer_of_the_user(plugins, weights):
    model = SplitQuantPass(plugins=plugins)(Net())
    reference = copy.deepcopy(model)
    model = quantized(model, weights, optimizer=quanto.HqqOptimizer())
    assert isinstance(model[2].lower.optimizer.inner, quanto.HqqOptimizer)
    for held, zeros in parts_and_zeros(model, reference):
        assert bool((held[zeros] == 0).all())


@LOW
def test_stock_quanto_would_not_keep_the_zeros(weights):
    # If this ever fails, quanto represents 0 by itself and the optimizer can go.
    tensor = torch.rand(8, 24) * 1.4 - 0.3
    tensor[:, ::2] = 0
    held, _ = rounded(tensor, int(weights[-1]), quanto.MaxOptimizer())
    assert not bool((held[tensor == 0] == 0).all())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "apply_manifest"])
def test_copies_of_a_split_model_keep_their_zeros(plugins, how, monkeypatch):
    import pickle

    from splitquant_plugins import apply_manifest, manifest_of
    from splitquant_plugins.plugins import Plugins

    def load(cls):
        return plugins

    monkeypatch.setattr(Plugins, "load", classmethod(load))
    model = SplitQuantPass(plugins=plugins)(Net())
    twin = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "apply_manifest": lambda: apply_manifest(Net(), manifest_of(model)),
    }[how]()
    twin.load_state_dict(model.state_dict())
    for held, zeros in parts_and_zeros(quantized(twin, "qint2"), model):
        assert bool((held[zeros] == 0).all())


@LOW
def test_shared_modules_and_tied_weights(plugins, models, weights):
    model = SplitQuantPass(plugins=plugins)(models.tied())
    reference = copy.deepcopy(model)
    model = quantized(model, weights)
    assert model.first is model.again
    for held, zeros in parts_and_zeros(model, reference):
        assert bool((held[zeros] == 0).all())


def test_layers_that_were_not_split_keep_quantos_optimizer(plugins):
    model = SplitQuantPass(plugins=plugins, exclude="2")(Net())
    quanto.quantize(model, weights=quanto.qint2)
    assert type(model[2].optimizer) is quanto.MaxOptimizer
    assert type(model[3].lower.optimizer) is ZeroExactOptimizer


def test_eight_bits_are_left_to_quanto(plugins):
    model = SplitQuantPass(plugins=plugins)(Net())
    reference = copy.deepcopy(model)
    quanto.quantize(model, weights=quanto.qint8)
    assert type(model[2].lower.optimizer) is quanto.AbsmaxOptimizer
    quanto.freeze(model)
    for held, zeros in parts_and_zeros(model, reference):
        assert bool((held[zeros] == 0).all())


@torch.no_grad()
def test_the_kernel_for_groups_of_128_in_bfloat16_sees_zeros(plugins):
    # Here quanto multiplies with a kernel of torch that dequantizes by itself.
    model = SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(256, 32, bias=False).bfloat16()))
    before = copy.deepcopy(model)
    quantized(model, "qint4")
    for part in model[0].part_names:
        layer, weight = getattr(model[0], part), getattr(before[0], part).weight
        assert "TinyGemm" in type(layer.weight).__name__
        seen = layer(torch.eye(256, dtype=torch.bfloat16)).t()
        assert bool((seen[weight == 0] == 0).all())
        assert torch.equal(seen, layer.weight.dequantize())
        assert float((seen - weight).abs().max()) <= float(weight.abs().max()) / 8


@given(
    bits=st.sampled_from([2, 4]),
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 3, 24, 130, 160]),
    shift=st.sampled_from([-10.0, 0.0, 10.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    hqq=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_tensor(bits, rows, columns, shift, scale, dtype, hqq, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = ((torch.randn(rows, columns, generator=generator) + shift) * scale).to(dtype)
    tensor[torch.rand(rows, columns, generator=generator) < 0.3] = 0
    if hqq and rows == 1:
        return  # quanto's HqqOptimizer itself takes no single row
    held, step = rounded(tensor, bits, ZeroExactOptimizer(quanto.HqqOptimizer() if hqq else None))
    assert bool(torch.isfinite(held).all())
    assert bool((held[tensor == 0] == 0).all())
    # The range includes 0 and covers the values: within half a step, and as much again for the rounded shift.
    reach = 1.05 if not hqq else 2.1
    assert float((held - tensor).abs().max()) <= reach * float(step.max())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("inner", [None, quanto.HqqOptimizer()], ids=["max", "hqq"])
def test_rows_far_from_zero_are_not_clipped(bits, inner):
    tensor = torch.stack([torch.linspace(10, 11, 24), torch.linspace(-11, -10, 24)])
    held, step = rounded(tensor, bits, ZeroExactOptimizer(inner))
    assert float((held - tensor).abs().max()) <= 1.01 * float(step.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_zeros_give_no_nan(bits, dtype):
    tensor = torch.zeros(4, 24, dtype=dtype)
    tensor[2] = 1
    for inner in (None, quanto.HqqOptimizer()):
        held, scale = rounded(tensor, bits, ZeroExactOptimizer(inner))
        assert torch.equal(held, tensor)
        assert bool((scale > 0).all())
