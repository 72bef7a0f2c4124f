"""Recipes: what files may say, and recipes of manifests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from splitquant_plugins import ClipPass, DecoupleQPass, SplitQuantPass, UniformGrid, manifest_of
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.recipes.files import read_recipe, write_recipe
from splitquant_plugins.recipes.recipe import Recipe, recipe_from, recipe_of
from splitquant_plugins.recipes.schema import PATH, schema_text

WHOLE = """
backend: quanto
weights: int2
method: hqq
split:
  splitter: kmeans
  k: 2
  method: sklearn     # of the splitter
  exclude: [lm_head, "*.0.*"]
decoupleq: {rounds: 2, starts: [1.0], include: "*.mlp.*"}
calibration: texts/some.csv
"""


@pytest.fixture
def file(tmp_path):
    def make(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return make


def test_a_recipe_is_read(file, tmp_path):
    recipe = read_recipe(file(WHOLE))
    assert (recipe.backend, recipe.weights, recipe.method) == ("quanto", "int2", "hqq")
    made = SplitQuantPass(**recipe.options())
    assert (made.config.k, made.config.exclude) == (2, ("lm_head", "*.0.*"))
    assert recipe.calibration == str(tmp_path / "texts" / "some.csv")


def test_what_is_written_is_what_was_read_in_another_folder_too(file, tmp_path):
    recipe = read_recipe(file(WHOLE))
    for folder, calibration in ((tmp_path, "texts/some.csv"), (tmp_path / "a", str(tmp_path / "texts" / "some.csv"))):
        write_recipe(folder / "again.yaml", recipe)
        assert read_recipe(folder / "again.yaml") == recipe
        assert f"calibration: {calibration}\n" in (folder / "again.yaml").read_text()


def test_json_and_an_empty_mapping_are_recipes(file):
    assert read_recipe(file('{"split": "none", "decoupleq": {}, "calibration": "self"}')).split == "none"
    assert read_recipe(file("{}")) == Recipe()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("wieghts: int2", "a recipe has no 'wieghts'; did you mean 'weights'?"),
        ("split: {spliter: kmeans}", "split with splitter 'auto' has no 'spliter'; did you mean 'splitter'?"),
        ("split: {splitter: kmaens}", "splitter has no 'kmaens'; did you mean 'kmeans'?"),
        ("split: {splitter: kmeans, n_inits: 3}", "has no 'n_inits'; did you mean 'n_init'?"),
        ("split: {k: 17}", "split: SplitQuantPass option k=17"),
        ("split: {k: 2, budget: 3.0}", "budget chooses the parts of each layer; leave k out"),
        ("backend: quonto", "backend has no 'quonto'; did you mean 'quanto'?"),
        ("granularity: row", "granularity: 'row': "),
        ("group_size: 0", "group_size: 0: "),
        ("format: 2", "format: 2: "),
        ("split: all", "split: 'all': "),
        ("decoupleq: {round: 3}\ncalibration: self", "decoupleq has no 'round'; did you mean 'rounds'?"),
        ("decoupleq: {rounds: many}\ncalibration: self", "decoupleq: DecoupleQPass option rounds='many'"),
        ("- a list", "is no recipe: it holds a list"),
        ("", "is no recipe: it holds a NoneType"),
    ],
)
def test_what_is_wrong_is_an_error_with_the_nearest_name(file, plugins, text, problem):
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, plugins)
    assert str(caught.value).startswith(str(path))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "is no YAML"),
        ("backend: quanto\nbackend: inc", "the key 'backend' is there twice"),
        ("split: &one {k: 2}\ndecoupleq: *one", "aliases are not read"),
        ("backend: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("[" * 5000, "is no YAML"),
        ("# " + "x" * 1_000_001, "bytes, which no recipe takes"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_an_error(file, text, problem):
    with pytest.raises(InputError, match=problem):
        read_recipe(file(text))
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(file("{}").with_name("none.yaml"))


def test_the_recipe_of_a_manifest_makes_it_again(plugins, models):
    given = {"splitter": "kmeans", "k": 2, "method": "sklearn", "n_init": 3, "exclude": ("0",), "seed": 4}
    manifest = manifest_of(SplitQuantPass(plugins=plugins, **given)(models.mlp()))
    recipe = recipe_from(recipe_of(manifest).as_written(), "a recipe")
    again = manifest_of(SplitQuantPass(plugins=plugins, **recipe.options())(models.mlp()))
    assert (again.config, again.splitter_options) == (manifest.config, manifest.splitter_options)
    assert recipe.split == {**given, "exclude": ["0"]}


@pytest.mark.parametrize("split", [True, False])
def test_the_recipe_of_decoupleq_has_its_options(plugins, split):
    batches = [torch.randn(32, 6) for _ in range(2)]
    solver = DecoupleQPass(calibration=batches, plugins=plugins, rounds=1, starts=(1.0,))
    passes = SplitQuantPass(plugins=plugins, k=2, splitter="kmeans") + solver if split else solver
    model = passes.apply(nn.Sequential(nn.Linear(6, 4)), grid=UniformGrid(2, granularity="channel"))
    recipe = recipe_of(manifest_of(model))
    assert recipe.decoupleq == {"rounds": 1, "starts": [1.0]}
    assert recipe.split == ({"k": 2, "splitter": "kmeans", "method": "exact", "n_init": 1} if split else "none")


def test_the_schema_that_is_shipped_is_that_of_the_code():
    assert PATH.read_text() == schema_text(), "python -m splitquant_plugins.recipes.schema"
    properties = json.loads(PATH.read_text())["properties"]
    assert properties.keys() == Recipe.model_fields.keys()
    assert {"splitter", "n_init", "budget"} <= properties["split"]["anyOf"][0]["properties"].keys()


def test_a_recipe_that_is_no_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("a pipe was read"))
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="give a file"):
            read_recipe(path)


def test_a_clipped_model_has_no_recipe_file(plugins):
    torch.manual_seed(0)
    model = ClipPass(plugins=plugins).apply(torch.nn.Sequential(torch.nn.Linear(16, 8)), grid=UniformGrid(2))
    with pytest.raises(ConfigError, match="ClipPass, which recipe files do not hold"):
        recipe_of(manifest_of(model))
