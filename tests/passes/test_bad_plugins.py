"""A splitter or plugin that breaks the rules is named, with its layer, and the model is put back."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from splitquant_plugins import SplitQuantPass, hookimpl
from splitquant_plugins.errors import ConfigError, PluginError
from splitquant_plugins.plugins import Plugins, Registered


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def in_place(tensor, plan):
    tensor.data.mul_(2)
    return [tensor.clamp(min=0), tensor.clamp(max=0)]


def sorting(tensor, plan):
    tensor.numpy().sort()
    return [tensor.clamp(min=0), tensor.clamp(max=0)]


def raising(tensor, plan):
    raise ZeroDivisionError("of all things\nat length")


def leaving(tensor, plan):
    sys.exit(0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (in_place, r"0\.weight: splitter 'test' wrote into the tensor"),
        (sorting, r"0\.weight: splitter 'test' wrote into the tensor"),
        (raising, r"0\.weight: splitter 'test' of plugin 'test' raised ZeroDivisionError: of all things"),
        (leaving, r"0\.weight: splitter 'test' of plugin 'test' raised SystemExit"),
    ],
)
def test_w10_c5_a_splitter_that_breaks_the_rules_is_named(model, with_splitter, split, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PluginError, match=message):
        SplitQuantPass(splitter="test", plugins=with_splitter(split))(model)
    assert [type(each) for each in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("hook", ["splitquant_after_split", "splitquant_after_layer", "splitquant_prepare_model"])
def test_c5_whatever_a_hook_raises_the_model_is_put_back(model, plugins, hook, error):
    class Plugin:
        pass

    def after_split(model, manifest):
        raise error("no")

    def after_layer(record):
        raise error("no")

    def prepare_model(model, config):
        raise error("no")

    setattr(Plugin, hook, staticmethod(hookimpl(locals()[hook.removeprefix("splitquant_")])))
    plugins.add(Plugin(), "bad")
    expected = PluginError if error is SystemExit else error
    with pytest.raises(expected, match="sys.exit" if error is SystemExit else "no"):
        SplitQuantPass(plugins=plugins)(model)
    assert [type(each) for each in model] == [nn.Linear, nn.ReLU, nn.Linear]
    SplitQuantPass()(model)  # it does not count as split


def test_c5_a_module_that_exits_at_import_is_a_broken_plugin(tmp_path, monkeypatch):
    folder = tmp_path / "leaving-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: leaving\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[splitquant]\nleaving = leaving_plugin\n")
    (tmp_path / "leaving_plugin.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="broken plugin 'leaving'"):
        loaded = Plugins.load({})
    assert [info.name for info in loaded.broken] == ["leaving"]


def test_c5_a_constructor_that_raises_is_named():
    def make():
        raise ZeroDivisionError("at birth")

    with pytest.raises(PluginError, match="plugin 'theirs': making its 'odd' raised ZeroDivisionError: at birth"):
        Registered("odd", make, "", "theirs").create()


@pytest.mark.parametrize(("dim", "fits"), [(5, False), (-6, False), (-1, True), (1, True)])
def test_c7_an_impossible_activation_dim_is_found_at_split_time(model, dim, fits):
    split = SplitQuantPass(activations=True, activation_dim=dim)
    if fits:
        split(model)
        return
    with pytest.raises(ConfigError, match=f"activation_dim={dim}: activation 1 is given tensors"):
        split(model)
    assert isinstance(model[1], nn.ReLU)
