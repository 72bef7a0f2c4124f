"""Options: an unknown or impossible one is an error that says what is allowed."""

from __future__ import annotations

import pytest
import torch
from pydantic import Field

from splitquant_plugins import (
    SplitConfig,
    SplitQuantPass,
    Splitter,
    SplitterOptions,
    UniformGrid,
    hookimpl,
    manifest_of,
)
from splitquant_plugins.config import config_from
from splitquant_plugins.errors import ConfigError, InputError, SplitQuantError


def test_the_defaults_are_the_papers_but_for_the_splitter():
    config = SplitQuantPass().config
    assert config == SplitConfig()
    assert (config.k, config.splitter, config.granularity) == (3, "auto", "auto")
    assert (config.split_bias, config.activations, config.fold_batchnorm) == (True, False, True)


@pytest.mark.parametrize("options", [{"kk": 3}, {"clusters": 3, "k": 2}, {"Seed": 1}])
def test_an_unknown_option_lists_the_known_ones(options):
    with pytest.raises(ConfigError, match=r"has no option .*it takes: .*exclude.*\bk\b.*seed.*split_bias"):
        SplitQuantPass(**options)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"k": 0}, "greater than or equal to 1"),
        ({"k": 17}, "less than or equal to 16"),
        ({"k": 3.0}, "integer"),
        ({"k": "3"}, "integer"),
        ({"k": True}, "integer"),
        ({"granularity": "row"}, "'auto', 'tensor' or 'channel'"),
        ({"split_bias": "yes"}, "boolean"),
        ({"activations": 1}, "boolean"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"include": 3}, "tuple"),
        ({"exclude": [3]}, "string"),
        ({"splitter": None}, "string"),
        ({"activation_dim": "last"}, "integer"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(options, allowed):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"option {name}.*{allowed}"):
        SplitQuantPass(**options)


@pytest.mark.parametrize("jobs", [0, -2, 1.0, True, None])
def test_jobs(jobs):
    with pytest.raises(ConfigError, match="jobs"):
        SplitQuantPass(jobs=jobs)


def test_an_unknown_splitter_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown splitter 'kmaens': choose from .*kmeans"):
        SplitQuantPass(splitter="kmaens")


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(ConfigError, match=r"k=0.*seed=-1"):
        SplitQuantPass(k=0, seed=-1)


def test_errors_are_of_this_package_and_value_errors():
    assert issubclass(ConfigError, SplitQuantError)
    assert issubclass(ConfigError, ValueError)


def test_one_pattern_or_a_list():
    assert config_from({"include": "a*", "exclude": ["b", "c"]}) == SplitConfig(include=("a*",), exclude=("b", "c"))


def test_options_cannot_be_changed_later():
    with pytest.raises(ValueError, match="frozen"):
        SplitQuantPass().config.k = 4


class CutOptions(SplitterOptions):
    at: float = Field(0.0, ge=0)


class Cut(Splitter):
    Options = CutOptions

    def split(self, tensor, plan, grid):
        assert isinstance(plan.options, CutOptions)
        return [tensor.clamp(max=plan.options.at), tensor - tensor.clamp(max=plan.options.at)]


class CutPlugin:
    @hookimpl
    def splitquant_register_splitters(self, register):
        register("cut", Cut, "at a value")


def test_options_of_a_splitter(plugins):
    plugins.add(CutPlugin(), "cut")
    chosen = SplitQuantPass(plugins=plugins, splitter="cut", at=0.5)
    assert chosen.splitter_options == CutOptions(at=0.5)
    assert "at=0.5" in repr(chosen)
    with pytest.raises(ConfigError, match=r"splitter 'cut' has no option 'att'; it takes: .*at"):
        SplitQuantPass(plugins=plugins, splitter="cut", att=1)
    with pytest.raises(ConfigError, match=r"splitter 'cut' option at=-1.*greater than or equal to 0"):
        SplitQuantPass(plugins=plugins, splitter="cut", at=-1)
    with pytest.raises(ConfigError, match="'at'"):
        SplitQuantPass(plugins=plugins, at=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"calibration_bytes": 0},
        {"calibration_bytes": "x"},
        {"progress": "no"},
        {"plugins": 3},
        {"splitter": "grid", "use_second_moment": "no"},
        {"splitter": "halve", "threshold": "0.5"},
    ],
)
def test_options_of_another_type_are_named(options):
    with pytest.raises(ConfigError, match=list(options)[-1]):
        SplitQuantPass(**options)


@pytest.mark.parametrize("options", [{"grid": 3}, {"ignore": "0"}])
def test_what_a_recipe_hands_over_is_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SplitQuantPass(splitter="kmeans").apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), **options)


@pytest.mark.parametrize("bits", [1, 2.5, "2", True])
def test_bits_of_a_grid_are_a_whole_number(bits):
    with pytest.raises(ConfigError, match="2 to 8 bits"):
        UniformGrid(bits)


def test_a_batch_without_rows_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(InputError, match="calibration batch 2 holds a tensor without values"):
        SplitQuantPass(calibration=[torch.ones(2, 4), torch.ones(0, 4)]).apply(model, grid=UniformGrid(2))


class Unused(torch.nn.Sequential):
    """A model that has a layer it does not call."""

    def forward(self, x):
        return self[0](x)


def test_a_layer_that_calibration_does_not_reach_is_said_to_be():
    model = Unused(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = SplitQuantPass(splitter="grid", calibration=[torch.randn(32, 8)]).apply(model, grid=UniformGrid(2))
    reached, unused = manifest_of(model).layers
    assert reached.why == ""
    assert unused.why == "the calibration batches do not reach it, and its errors are those of its weight"
