"""What INC 3.10 gets wrong: refused with the cause, and each shown to be wrong still."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, convert, prepare, quantize
from splitquant_inc.stored_layers import dequantized
from torch import nn

from splitquant_plugins.errors import ConfigError, InputError

MENDED = "INC has mended this: the refusal in splitquant_inc/refuse.py can go"


def calibrate(model):
    for seed in range(2):
        model(torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    "recipe",
    [
        RTNConfig(bits=8, use_sym=False),
        RTNConfig(dtype="int8", use_sym=False),
        RTNConfig(bits=4).set_local("head", RTNConfig(bits=8, use_sym=False)),
        GPTQConfig(bits=8, use_sym=False),
    ],
)
def test_8_bit_asymmetric_is_refused(net, split_pass, recipe):
    model = net()
    with pytest.raises(ConfigError, match="wraps 8-bit asymmetric"):
        quantize(model, split_pass() + recipe)
    assert type(model.head) is nn.Linear


def test_8_bit_asymmetric_still_wraps(net, sqnr):
    weight = net().head.weight.detach()
    found = quantize(net(), RTNConfig(bits=8, use_sym=False, use_layer_wise=False)).head
    assert sqnr(weight, dequantized(found)) < 20, MENDED
    assert sqnr(weight, dequantized(quantize(net(), RTNConfig(bits=7, use_sym=False, use_layer_wise=False)).head)) > 25


def test_symmetric_gptq_is_refused(net, split_pass):
    with pytest.raises(ConfigError, match="clips rows without negative values"):
        prepare(net(), split_pass() + GPTQConfig())


@torch.no_grad()
def test_symmetric_gptq_still_clips(net):
    model = net()
    model.layers[0].up.weight.abs_()
    largest = float(model.layers[0].up.weight.max())
    model = prepare(model, GPTQConfig(bits=4, group_size=-1))
    calibrate(model)
    assert float(dequantized(convert(model).layers[0].up).max()) < 0.6 * largest, MENDED


@pytest.mark.parametrize("option", ["use_layer_wise", "use_block_wise"])
def test_gptq_from_a_checkpoint_is_refused(net, split_pass, option):
    with pytest.raises(ConfigError, match="finds no split layer"):
        prepare(net(), split_pass() + GPTQConfig(use_sym=False, **{option: True}))


def test_weights_on_the_meta_device_are_refused(net, split_pass):
    with pytest.raises(InputError, match="cannot find split layers"):
        quantize(net().to("meta"), split_pass() + RTNConfig())


def test_layer_wise_still_cannot_find_split_layers(models, split_pass, tmp_path):
    torch.manual_seed(2)
    models.bert().save_pretrained(tmp_path)
    bert = type(models.bert()).from_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"lower|not found|No such") as error:
        quantize(split_pass()(bert), RTNConfig())
    assert not isinstance(error.value, ConfigError), MENDED
    bert = type(models.bert()).from_pretrained(tmp_path)
    quantize(bert, split_pass() + RTNConfig())  # the recipe turns it off


@pytest.mark.parametrize("options", [{"white_list": [".*up"]}, {"local": True}], ids=["white_list", "fp32"])
def test_layers_excluded_from_gptq_are_refused_and_still_quantized(net, split_pass, quantized, options):
    def recipe():
        if "local" in options:
            excluded = GPTQConfig(dtype="fp32", model_path=net().name_or_path)
            return GPTQConfig(use_sym=False).set_local(".*down", excluded)
        return GPTQConfig(use_sym=False, **options)

    with pytest.raises(ConfigError, match="quantizes every layer of a transformer block"):
        prepare(net(), split_pass() + recipe())
    model = prepare(net(), recipe())
    calibrate(model)
    assert "layers.0.down" in quantized(convert(model)), MENDED


def test_transformers_after_inc_is_refused_and_still_fails(python_path):
    script = """
import logging, warnings; warnings.simplefilter("ignore")
from neural_compressor.torch.quantization import RTNConfig, quantize
logging.getLogger("neural_compressor").setLevel(logging.ERROR)
import torch
net = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4))
quantize(net(), RTNConfig())
import transformers, splitquant_inc.plugin
from splitquant_plugins import SplitQuantPass
from splitquant_plugins.plugins import Plugins
plugins = Plugins.load()
if "inc" not in plugins.backends: plugins.add(splitquant_inc.plugin, "inc")
try: quantize(net(), RTNConfig())
except NameError as error: print("INC:", error)
try: quantize(net(), SplitQuantPass(k=1, plugins=plugins) + RTNConfig())
except Exception as error: print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], env=python_path(), capture_output=True, text=True, check=True)
    assert "INC: name 'transformers' is not defined" in done.stdout, MENDED
    assert "ConfigError INC fails where transformers is imported after" in done.stdout
