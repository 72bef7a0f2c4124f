"""Loading, listing and refusing plugins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from splitquant_plugins import LayerPlan, SplitQuantPass, Splitter, hookimpl, hookspecs
from splitquant_plugins.errors import CannotSplit, ConfigError, PluginError
from splitquant_plugins.plugins import BUILTIN_PLUGINS, Plugins


class Halves(Splitter):
    def split(self, tensor, plan, grid):
        return [tensor / 2, tensor / 2]


def make(**hooks):
    """A plugin object with those hooks."""
    return type("Plugin", (), {name: hookimpl(hook) for name, hook in hooks.items()})()


def registers(name="halves", factory=Halves):
    return make(splitquant_register_splitters=lambda self, register: register(name, factory, ""))


def test_the_built_ins_go_through_the_hooks():
    plugins = Plugins.load({})
    used = {hook for info in plugins.infos if info.source == "built in" for hook in info.hooks}
    assert used >= {
        "splitquant_register_splitters",
        "splitquant_select_layer",
        "splitquant_build_module",
        "splitquant_prepare_model",
        "splitquant_split_tensor",
    }
    assert plugins.splitters["kmeans"].plugin == "splitters"
    assert len([info for info in plugins.infos if info.source == "built in"]) == len(BUILTIN_PLUGINS) + 1


def test_every_hook_is_documented():
    specs = [name for name in vars(hookspecs) if name.startswith("splitquant_")]
    assert len(specs) == 10
    assert all(getattr(hookspecs, name).__doc__ for name in specs)


def test_a_plugin_adds_a_splitter(plugins):
    plugins.add(registers(), "halves", "a test", "1.2")
    model = SplitQuantPass(plugins=plugins, splitter="halves")(nn.Sequential(nn.Linear(3, 2)))
    assert torch.equal(model[0].lower.weight, model[0].upper.weight)
    assert (plugins.infos[-1].name, plugins.infos[-1].version) == ("halves", "1.2")


def test_a_name_is_taken_once(plugins):
    plugins.add(registers(), "halves")
    with pytest.raises(PluginError, match="'halves' is already registered by plugin 'halves'"):
        plugins.add(registers(), "other")
    with pytest.raises(PluginError, match="'halves' is registered already"):
        plugins.add(registers("more"), "halves")
    assert "more" not in plugins.splitters
    assert plugins.splitter("halves")


def test_the_same_plugin_twice_keeps_the_first(plugins):
    told = []
    one = make(splitquant_after_layer=lambda self, record: told.append(record))
    plugins.add(one, "one")
    with pytest.raises(PluginError, match="registered already"):
        plugins.add(one, "two")
    plugins.after_layer(3)
    assert told == [3]


def test_built_in_names_cannot_be_taken(plugins):
    with pytest.raises(PluginError, match="already registered by plugin 'splitters'"):
        plugins.add(registers("kmeans"), "impostor")
    assert plugins.splitters["kmeans"].plugin == "splitters"


def fails(self, register):
    register("half", Halves, "")
    raise OSError("no disk")


@pytest.mark.parametrize(
    ("plugin", "problem", "kind"),
    [
        (
            make(splitquant_register_spliters=lambda self: None),
            "unknown hook splitquant_register_spliters",
            PluginError,
        ),
        (make(splitquant_after_layer=lambda self, recrod: None), "recrod", Exception),
        (make(splitquant_register_splitters=fails), "no disk", OSError),
    ],
)
def test_a_wrong_plugin_is_refused_and_undone(plugins, plugin, problem, kind):
    names = (set(plugins.splitters), set(plugins.backends), len(plugins.infos))
    with pytest.raises(kind, match=problem):
        plugins.add(plugin, "wrong")
    assert (set(plugins.splitters), set(plugins.backends), len(plugins.infos)) == names
    plugins.add(registers(), "wrong")  # the name is free again
    SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(3, 2)))


def test_a_factory_that_cannot_be_imported_names_the_plugin(plugins):
    plugins.add(registers("ghost", "no_such_module:Ghost"), "ghosts")
    with pytest.raises(PluginError, match="plugin 'ghosts' registered 'ghost' as 'no_such_module:Ghost'"):
        SplitQuantPass(plugins=plugins, splitter="ghost")


def test_a_factory_of_something_else_is_refused(plugins):
    plugins.add(registers("number", lambda: 3), "numbers")
    with pytest.raises(PluginError, match="plugin 'numbers': its splitter 'number' is a int, not a Splitter"):
        SplitQuantPass(plugins=plugins, splitter="number")


@pytest.mark.parametrize(
    ("hooks", "problem"),
    [
        ({"splitquant_select_layer": lambda self: "yes"}, "answered splitquant_select_layer with a str"),
        ({"splitquant_split_tensor": lambda self, tensor: tensor}, "answered splitquant_split_tensor with a Tensor"),
        ({"splitquant_split_tensor": lambda self, tensor: [1, 2]}, "answered splitquant_split_tensor with a int"),
        ({"splitquant_build_module": lambda self, module: module}, "answered splitquant_build_module with a Linear"),
    ],
)
def test_a_wrong_answer_is_an_error(plugins, hooks, problem):
    plugins.add(make(**hooks), "wrong")
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(PluginError, match=problem):
        SplitQuantPass(plugins=plugins)(model)
    assert type(model[0]) is nn.Linear


def test_the_last_registered_answers_first(plugins):
    def split(self, tensor, plan):
        return [tensor, torch.zeros_like(tensor)] if plan.layer == "0" else None

    plugins.add(make(splitquant_split_tensor=split), "mine")
    model = SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    assert model[0].part_names == ("lower", "upper")
    assert model[1].part_names == ("lower", "middle", "upper")


def test_a_hook_may_leave_a_tensor_whole(plugins):
    def split(self, plan):
        raise CannotSplit("on a Monday")

    plugins.add(make(splitquant_split_tensor=split), "mine")
    model = SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(3, 2)))
    assert model.splitquant_manifest.kept[0].reason == "on a Monday"


def test_preparation_steps_run_in_the_order_of_registration(plugins):
    for name in ("one", "two"):
        plugins.add(make(splitquant_prepare_model=lambda self, name=name: [name]), name)
    model = SplitQuantPass(plugins=plugins)(nn.Sequential(nn.Linear(3, 2)))
    assert model.splitquant_manifest.notes == ["one", "two"]


def test_an_unknown_recipe_lists_the_backends(plugins):
    with pytest.raises(ConfigError, match=r"attach to a builtins\.dict; backends: .*quanto"):
        SplitQuantPass(plugins=plugins) + {"bits": 2}


def test_a_plugin_attaches_its_recipe(plugins):
    plugins.add(make(splitquant_attach=lambda self, split_pass, recipe: (recipe, split_pass.config.k)), "mine")
    assert SplitQuantPass(plugins=plugins, k=2) + "recipe" == ("recipe", 2)


def test_an_unknown_backend_lists_the_known(plugins):
    with pytest.raises(ConfigError, match=r"unknown backend 'qunato': choose from .*quanto"):
        plugins.backend("qunato")


def test_blocked_plugins_are_not_loaded():
    assert "quanto" not in Plugins.load({"SPLITQUANT_BLOCK_PLUGINS": "quanto, other"}).backends


def test_copies_share_the_plugins(plugins):
    assert copy.deepcopy(plugins) is plugins


def test_plans_hide_their_tensors():
    assert "tensor(" not in repr(LayerPlan("linear", torch.zeros(3), None))
