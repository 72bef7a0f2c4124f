"""GPTQ and HQQ behind a pass."""

from __future__ import annotations

import pytest
import torch
from neural_compressor.torch.quantization import GPTQConfig, HQQConfig, RTNConfig, convert, prepare, quantize
from splitquant_inc.stored_layers import dequantized
from torch import nn

from splitquant_plugins import DecoupleQPass
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.manifest import manifest_of
from splitquant_plugins.modules import SplitLinear


def calibrate(model):
    for seed in range(3):
        model(torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def test_gptq_splits_what_it_quantizes(net, ids, split_pass, quantized, sqnr):
    wanted = net()(ids)
    outputs = {}
    for name, recipe in {
        "plain": GPTQConfig(bits=2, use_sym=False, group_size=-1),
        "split": split_pass() + GPTQConfig(bits=2, use_sym=False, group_size=-1),
    }.items():
        model = prepare(net(), recipe)
        calibrate(model)
        model = convert(model)
        outputs[name] = sqnr(wanted, model(ids))
    assert outputs["split"] > outputs["plain"] + 3
    assert len(quantized(model)) == 12
    assert type(model.head) is nn.Linear
    assert {r.name: r.reason for r in manifest_of(model).kept}["head"] == "the recipe does not quantize it"


@torch.no_grad()
def test_gptq_by_quantize_and_with_layer_options(net, split_pass, quantized):
    recipe = split_pass() + GPTQConfig(bits=4, use_sym=False).set_local(".*up", GPTQConfig(bits=2, use_sym=False))
    model = quantize(net(), recipe, run_fn=calibrate)
    bits = {name.rpartition(".")[0]: module.bits for name, module in quantized(model).items()}
    assert bits == {"layers.0.up": 2, "layers.0.down": 4, "layers.1.up": 2, "layers.1.down": 4}


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_with_its_default_options(net, ids, split_pass, quantized, sqnr, bits):
    wanted = net()(ids)
    plain = sqnr(wanted, quantize(net(), HQQConfig(bits=bits, group_size=16))(ids).float())
    model = quantize(net(), split_pass() + HQQConfig(bits=bits, group_size=16))
    assert len(quantized(model)) == 15
    assert sqnr(wanted, model(ids).float()) > plain + 3


@torch.no_grad()
@pytest.mark.parametrize(("bits", "quant_scale"), [(2, False), (3, False), (8, False), (4, True)])
def test_zeros_stay_zero_under_hqq(net, split_pass, quantized, bits, quant_scale):
    options = {"bits": bits, "group_size": 16, "quant_scale": quant_scale, "scale_quant_group_size": 8}
    model = prepare(net(), split_pass() + HQQConfig(**options))
    parts = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = quantized(convert(model))
    assert len(found) == 15
    for name, module in found.items():
        weight = dequantized(module)
        assert weight.isfinite().all()
        assert not weight[parts[name] == 0].any(), name
        assert weight.any() == parts[name].any()


@torch.no_grad()
def test_hqq_alone_loses_zeros_and_overflows(net, split_pass, quantized):
    """What the adapter mends; where this fails, INC has mended it, and the correction can go."""
    split = split_pass()(net())
    parts = {n: m.weight.detach().clone() for n, m in split.named_modules() if isinstance(m, nn.Linear)}
    at_2 = quantized(quantize(split, HQQConfig(bits=2, group_size=16, quant_zero=False)))
    assert max(float(dequantized(m)[parts[n] == 0].abs().max()) for n, m in at_2.items()) > 1e-3
    at_8 = quantized(quantize(split_pass()(net()), HQQConfig(bits=8, group_size=16)))
    assert any(not dequantized(module).isfinite().all() for module in at_8.values())


def test_the_float_weights_are_let_go_after_hqq(net, split_pass):
    recipe = split_pass() + HQQConfig(bits=4, group_size=16)
    prepared = prepare(net(), recipe)
    copy = convert(prepared, inplace=False)
    for model in (copy, convert(prepared)):
        splits = [module for module in model.modules() if isinstance(module, SplitLinear)]
        assert len(splits) == 5
        assert all(not hasattr(split._part_replaced, "_floats") for split in splits)


def test_layer_options_and_white_list_under_hqq(net, split_pass, quantized):
    recipe = split_pass() + HQQConfig(bits=4, group_size=16).set_local("head", HQQConfig(dtype="fp32"))
    model = quantize(net(), recipe)
    assert type(model.head) is nn.Linear
    assert len(quantized(model)) == 12
    only_head = quantize(net(), split_pass() + HQQConfig(bits=4, group_size=16, white_list=["head"]))
    assert len(quantized(only_head)) == 3


def test_decoupleq_is_refused_in_front_of_what_has_no_linear_grid(net, ids):
    batches = [ids]
    for recipe in (HQQConfig(bits=2), RTNConfig(bits=2, use_sym=False, use_double_quant=True)):
        with pytest.raises(ConfigError, match="no linear grid that is known beforehand"):
            prepare(net(), DecoupleQPass(calibration=batches) + recipe)
