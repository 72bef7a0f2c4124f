"""A pass and a recipe with a pass are pickled, copied, compared, and written as JSON with all their options."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from splitquant_plugins import DecoupleQPass, SplitQuantPass
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.base import pass_from_dict

BATCHES = [torch.arange(24.0).reshape(2, 12), (torch.ones(1, 12),), {"input": torch.zeros(1, 12)}]
PASSES = {
    "default": lambda: SplitQuantPass(),
    "options": lambda: SplitQuantPass(k=2, include=("a*", "b"), exclude="c", split_bias=False, seed=5, jobs=2),
    "splitter": lambda: SplitQuantPass(splitter="ocs", ratio=0.05),
    "budget": lambda: SplitQuantPass(budget=4.5),
    "calibrated": lambda: SplitQuantPass(splitter="grid", calibration=BATCHES, calibration_bytes=2**20),
    "decoupleq": lambda: DecoupleQPass(calibration=BATCHES),
    "function": lambda: DecoupleQPass(calibration=batches),
    "sequence": lambda: SplitQuantPass(k=2) + DecoupleQPass(calibration=batches),
}


def batches():
    yield from BATCHES


def quanto():
    pytest.importorskip("optimum.quanto")
    return pytest.importorskip("transformers").QuantoConfig(weights="int2", modules_to_not_convert=["head"])


def inc():
    return pytest.importorskip("neural_compressor.torch.quantization").RTNConfig(bits=2, use_sym=False, group_size=-1)


def pt2e():
    pytest.importorskip("torchao")
    return pytest.importorskip("splitquant_pt2e").LowBitWeightQuantizer("int2", granularity="tensor")


RECIPES = {"quanto": quanto, "inc": inc, "pt2e": pt2e}


def made(name):
    return PASSES[name]()


@pytest.mark.parametrize("name", PASSES)
def test_c1_passes_are_pickled_copied_and_equal(name):
    one = made(name)
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), made(name)):
        assert other == one
        assert hash(other) == hash(one)
        assert repr(other) == repr(one)
    for other in set(PASSES) - {name}:
        assert made(other) != one


@pytest.mark.parametrize("name", PASSES)
def test_c2_passes_come_back_from_json(name):
    one = made(name)
    again = pass_from_dict(json.loads(json.dumps(one.to_dict())))
    assert type(again) is type(one)
    assert again.to_dict() == one.to_dict()
    assert (again == one) == (name in ("default", "options", "splitter", "budget"))  # JSON keeps no calibration


def test_c2_calibration_is_to_be_given_again():
    again = pass_from_dict(DecoupleQPass(calibration=BATCHES).to_dict())
    model = nn.Sequential(nn.Linear(12, 12))
    with pytest.raises(ConfigError, match="keeps no calibration data: set its attribute calibration"):
        again(model)
    again.calibration = BATCHES
    assert again == DecoupleQPass(calibration=BATCHES)
    again.calibration = batches
    assert again == DecoupleQPass(calibration=batches)
    with pytest.raises(ConfigError, match="keeps no calibration data"):
        pass_from_dict(made("calibrated").to_dict())(model)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "no pass is called None"),
        ({"pass": "os.system"}, "no pass is called 'os.system'"),
        ({"pass": "SplitQuantPass", "kk": 2}, "no option 'kk'"),
        ({"pass": "SplitQuantPass", "k": 99}, "k=99"),
        ({"pass": "SplitQuantPass", "plugins": "x"}, "neither calibration data nor plugins"),
        ({"pass": "SplitQuantPass", "calibration": [1]}, "neither calibration data nor plugins"),
        ({"pass": "PassSequence", "passes": []}, "a list of them"),
    ],
)
def test_described_passes_are_checked(described, message):
    with pytest.raises(ConfigError, match=message):
        pass_from_dict(described)


@pytest.mark.parametrize("backend", RECIPES)
def test_c1_recipes_are_pickled_copied_and_equal(backend):
    recipe = SplitQuantPass(k=2, seed=3) + RECIPES[backend]()
    for other in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert other == recipe
        assert isinstance(other, type(RECIPES[backend]()))
    assert recipe != SplitQuantPass(k=4, seed=3) + RECIPES[backend]()
    assert recipe != RECIPES[backend]()


@pytest.mark.parametrize("backend", ["quanto", "inc"])
def test_c2_recipes_come_back_from_json(backend, tmp_path):
    recipe = SplitQuantPass(k=2, seed=3, include=("1*",)) + RECIPES[backend]()
    described = json.loads(json.dumps(recipe.to_dict()))
    again = type(recipe).from_dict(described)
    assert again == recipe
    assert again.first.config.k == 2
    recipe.to_json_file(str(tmp_path / "recipe.json"))
    stored = json.loads((tmp_path / "recipe.json").read_text())
    assert type(recipe).from_dict(stored) == recipe


def test_c2_a_saved_model_config_keeps_the_pass(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig()
    config.quantization_config = SplitQuantPass(k=2) + quanto()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert type(config.quantization_config).from_dict(stored) == config.quantization_config
