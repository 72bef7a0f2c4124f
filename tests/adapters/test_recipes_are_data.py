"""A pass and a recipe with a pass are pickled, copied, compared, and written as JSON with all their options."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from splitquant_plugins import ClipPass, DecoupleQPass, SplitQuantPass
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
    "clip": lambda: ClipPass(),
    "clip, options": lambda: ClipPass(include=("a*", "b"), exclude="c"),
    "clip behind": lambda: SplitQuantPass(budget=3.0) + ClipPass(),
}
# Those that JSON keeps in full.
WITHOUT_DATA = ("default", "options", "splitter", "budget", "clip", "clip, options", "clip behind")
# Every option with a value that is not its default.
SPLIT_OPTIONS = {
    "k": 2,
    "splitter": "kmeans",
    "granularity": "channel",
    "include": ("a*", "b"),
    "exclude": ("c",),
    "split_bias": False,
    "activations": True,
    "activation_dim": 1,
    "fold_batchnorm": False,
    "untie_embeddings": True,
    "budget": 4.5,
    "objective": "predictions",
    "objective_groups": 2,
    "seed": 5,
    "jobs": 2,
    "progress": True,
    "calibration_bytes": 2**20,
}
DECOUPLEQ_OPTIONS = {
    "bits": 3,
    "granularity": "tensor",
    "group_size": 32,
    "scheme": "symmetric",
    "include": ("a*", "b"),
    "exclude": ("c",),
    "sequential": False,
    "asymmetric_calibration": 0.25,
    "coupled_rows": False,
    "objective": "predictions",
    "device": "cpu",
    "tune_blocks": True,
    "tune_model": True,
    "tune_codes": False,
    "tune_norms": False,
    "tune_biases": True,
    "epochs": 3,
    "block_window": 1,
    "block_steps": 9,
    "model_steps": 8,
    "batch_size": 2,
    "held_out": 0.25,
    "learning_rate": 1e-4,
    "code_learning_rate": 1e-3,
    "damping": 0.02,
    "rounding": "projected",
    "rounds": 1,
    "starts": (1.0, 0.5),
    "sweeps": 2,
    "search_inputs": 0,
    "seed": 7,
    "progress": True,
    "resume_dir": "somewhere",
    "calibration_bytes": 2**20,
}
CLIP_OPTIONS = {"include": ("a*", "b"), "exclude": ("c",)}
KINDS = {
    "SplitQuantPass": (SplitQuantPass, SPLIT_OPTIONS),
    "DecoupleQPass": (DecoupleQPass, DECOUPLEQ_OPTIONS),
    "ClipPass": (ClipPass, CLIP_OPTIONS),
}


def batches():
    yield from BATCHES


def quanto():
    pytest.importorskip("optimum.quanto")
    return pytest.importorskip("transformers").QuantoConfig(weights="int2", modules_to_not_convert=["head"])


def inc(kind="RTNConfig", local=False, **options):
    quantization = pytest.importorskip("neural_compressor.torch.quantization")
    made = getattr(quantization, kind)(bits=2, group_size=-1, **options)
    return made.set_local("head", getattr(quantization, kind)(bits=4, **options)) if local else made


def pt2e():
    pytest.importorskip("torchao")
    return pytest.importorskip("splitquant_pt2e").LowBitWeightQuantizer("int2", granularity="tensor")


def x86():
    home = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return home.X86InductorQuantizer().set_global(home.get_default_x86_inductor_quantization_config())


def xnnpack():
    home = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    return home.XNNPACKQuantizer().set_global(home.get_symmetric_quantization_config(is_per_channel=True))


RECIPES = {
    "quanto": quanto,
    "inc": lambda: inc(use_sym=False),
    "inc, local": lambda: inc(use_sym=False, local=True),
    "inc gptq": lambda: inc("GPTQConfig", use_sym=False, model_path="."),
    "inc hqq": lambda: inc("HQQConfig", quant_zero=False),
    "pt2e": pt2e,
    "x86": x86,
    "xnnpack": xnnpack,
}
FIRST = {
    "split": lambda: SplitQuantPass(k=2, seed=3, include=("1*",)),
    "decoupleq": lambda: DecoupleQPass(calibration=batches, rounds=1),
    "both": lambda: SplitQuantPass(k=2) + DecoupleQPass(calibration=BATCHES),
    "clip": lambda: ClipPass(exclude="head"),
}


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
    assert (again == one) == (name in WITHOUT_DATA)  # JSON keeps no calibration


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


@pytest.mark.parametrize("name", KINDS)
def test_c2_every_option_is_listed_here(name):
    kind, options = KINDS[name]
    made = kind(calibration=BATCHES) if kind is DecoupleQPass else kind()
    assert set(options) == set(made.options())


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in KINDS for option in KINDS[name][1]])
def test_c2_every_option_counts_and_comes_back(name, option):
    kind, options = KINDS[name]
    more = {"calibration": BATCHES} if kind is DecoupleQPass else {}
    default, made = kind(**more), kind(**{**more, option: options[option]})
    assert made != default
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert other == made
    again = pass_from_dict(json.loads(json.dumps(made.to_dict())))
    again.calibration = made.calibration
    assert again == made
    held = getattr(again.config, option) if hasattr(again.config, option) else getattr(again, option)
    assert held == options[option]


@pytest.mark.filterwarnings("ignore:XNNPACKQuantizer is deprecated")  # in torchao; it goes on in executorch
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("backend", RECIPES)
def test_c1_recipes_are_pickled_copied_and_equal(backend, first):
    recipe = FIRST[first]() + RECIPES[backend]()
    for other in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert other == recipe
        assert isinstance(other, type(RECIPES[backend]()))
        assert pickle.loads(pickle.dumps(other)) == recipe
    assert recipe == FIRST[first]() + RECIPES[backend]()
    assert recipe != SplitQuantPass(k=4, seed=3) + RECIPES[backend]()
    assert recipe != RECIPES[backend]()


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("backend", [name for name in RECIPES if name.startswith(("quanto", "inc"))])
def test_c2_recipes_come_back_from_json(backend, first, tmp_path):
    recipe = FIRST[first]() + RECIPES[backend]()
    described = json.loads(json.dumps(recipe.to_dict()))
    again = type(recipe).from_dict(described)
    assert again.to_dict() == recipe.to_dict()
    recipe.to_json_file(str(tmp_path / "recipe.json"))
    stored = json.loads((tmp_path / "recipe.json").read_text())
    for made in (again, type(recipe).from_dict(stored)):
        if first in ("split", "clip"):
            assert made == recipe
            assert made.first == FIRST[first]()
        else:
            assert made != recipe  # JSON keeps no calibration
            give_calibration(made.first, recipe.first)
            assert made == recipe


def give_calibration(made, first):
    for one, other in zip(getattr(made, "passes", [made]), getattr(first, "passes", [first]), strict=True):
        one.calibration = other.calibration


def test_c2_a_saved_model_config_keeps_the_pass(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig()
    config.quantization_config = SplitQuantPass(k=2) + quanto()
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert type(config.quantization_config).from_dict(stored) == config.quantization_config
