"""quanto's include and exclude on a model that was split before reach its parts, or are an error that says how."""

from __future__ import annotations

import pytest
from torch import nn

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import ConfigError

pytest.importorskip("optimum.quanto")

from optimum.quanto import qint8, quantize
from optimum.quanto.nn import QModuleMixin


@pytest.fixture
def model(plugins):
    return SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(module, QModuleMixin)}


@pytest.mark.parametrize("exclude", ["1", ["1"], ["0.*", "1"], "[1]"])
def test_w8_a_pattern_that_misses_the_parts_is_an_error(model, exclude):
    with pytest.raises(ConfigError, match=r"names the layer 1, which is split, .* write '1\.\*'"):
        quantize(model, weights=qint8, exclude=exclude)


@pytest.mark.parametrize("include", ["1", ["1"], ["0.*", "1"], ["1", "nothing"], "[1]", ["1", "1.l*"]])
def test_w8_include_that_misses_the_parts_is_an_error(model, include):
    with pytest.raises(ConfigError, match=r"names the layer 1, .* leave float: write '1\.\*'"):
        quantize(model, weights=qint8, include=include)


def test_w8_a_pattern_is_refused_before_anything_is_quantized(model):
    with pytest.raises(ConfigError, match="names the layer 1"):
        quantize(model, weights=qint8, exclude="1")
    assert not quantized(model)


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [({}, "01"), ({"exclude": "1*"}, "0"), ({"exclude": ["1.*"]}, "0"), ({"include": "1.*"}, "1")],
)
def test_patterns_that_reach_the_parts(model, patterns, layers):
    quantize(model, weights=qint8, **patterns)
    assert quantized(model) == {f"{layer}.{part}" for layer in layers for part in ("lower", "middle", "upper")}
