"""--recipe, --save-recipe and `splitquant recipe`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from splitquant_plugins.cli.main import run
from splitquant_plugins.cli.options import pass_options
from splitquant_plugins.recipes.files import read_recipe

pytest.importorskip("optimum.quanto")
pytest.importorskip("transformers")


@pytest.fixture
def recipe(tmp_path: Path, texts: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "weights: int2\nsplit: {splitter: kmeans, k: 2, exclude: [classifier]}\n"
        f"decoupleq: {{rounds: 1, starts: [1.0], sweeps: 1}}\ncalibration: {texts.name}\n"
    )
    return path


def test_compare_runs_a_recipe_beside_what_it_is_made_of(
    classifier: Callable[..., Path], texts: Path, recipe: Path, tmp_path: Path
) -> None:
    rows_file, saved = tmp_path / "rows.json", tmp_path / "saved.yaml"
    arguments = ["compare", str(classifier()), "--data", str(texts), "--recipe", str(recipe)]
    assert run([*arguments, "--json", str(rows_file), "--save-recipe", str(saved)]) == 0
    rows = json.loads(rows_file.read_text())
    assert [(row["weights"], row["split"], row["method"]) for row in rows] == [
        ("int2", "none", "rtn"),
        ("int2", "kmeans", "rtn"),
        ("int2", "none", "decoupleq"),
        ("int2", "kmeans", "decoupleq"),
    ]
    assert {row["k"] for row in rows} == {1, 2}
    again, first = read_recipe(saved), read_recipe(recipe)
    assert again == first.model_copy(update={"backend": "quanto", "method": "rtn"})


def test_quantize_runs_a_recipe_and_the_manifest_tells_it(
    classifier: Callable[..., Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved, told = tmp_path / "out", tmp_path / "saved.yaml", tmp_path / "told.yaml"
    arguments = ["quantize", str(classifier()), "--recipe", str(recipe), "--weights", "int4"]  # before the recipe's
    assert run([*arguments, "--output", str(folder), "--save-recipe", str(saved)]) == 0
    again = read_recipe(saved)
    assert again.weights == "int4"
    assert again.options() == {"splitter": "kmeans", "k": 2, "exclude": ["classifier"]}
    (folder / "splitquant_manifest.json").unlink()  # config.json has it too
    capsys.readouterr()
    assert run(["recipe", str(folder), "--output", str(told)]) == 0
    assert "needs calibration data" in capsys.readouterr().err
    told.write_text(told.read_text() + "calibration: texts.csv\n")
    found = read_recipe(told)
    assert (found.backend, found.weights, found.method) == ("quanto", "int4", "rtn")
    assert found.decoupleq == read_recipe(recipe).decoupleq
    assert found.options() == {"splitter": "kmeans", "k": 2, "exclude": ["classifier"], "method": "exact", "n_init": 1}
    assert run(["recipe", str(folder)]) == 0
    assert "weights: int4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-O", "granularity=tensor"], "-O beside --recipe: write the option into the recipe"),
        (["--save-recipe", "{recipe}/x/y"], "is not a folder"),
    ],
)
def test_options_that_would_be_lost_are_refused(
    classifier: Callable[..., Path], recipe: Path, tmp_path: Path, fails: Callable[..., str], arguments, problem
) -> None:
    more = [argument.format(recipe=recipe) for argument in arguments]
    assert problem in fails("quantize", classifier(), "--recipe", recipe, "--output", tmp_path / "out", *more)


def test_calibration_of_the_command_line_serves_a_recipe_without_any(
    classifier: Callable[..., Path], texts: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    recipe, model = tmp_path / "recipe.yaml", classifier()
    recipe.write_text("weights: int2\nsplit: none\ndecoupleq: {rounds: 1, starts: [1.0], sweeps: 1}\n")
    for command in (["quantize", model, "--output", tmp_path / "out"], ["compare", model, "--data", texts]):
        assert "needs calibration data" in fails(*command, "--recipe", recipe)
    given = ["--recipe", str(recipe), "--calibration", str(texts)]
    assert run(["quantize", str(model), "--output", str(tmp_path / "out"), *given]) == 0
    manifest = json.loads((tmp_path / "out" / "splitquant_manifest.json").read_text())
    assert manifest["values"]["rounds"] == 1


def test_patterns_may_be_numbers_as_the_layers_of_a_sequential_are_named() -> None:
    assert pass_options(extra=("exclude=0", "include=1,2", "activations=true")) == {
        "jobs": 1,
        "exclude": ("0",),
        "include": ("1", "2"),
        "activations": True,
    }


def test_a_wrong_recipe_and_several_in_one_are_refused(
    classifier: Callable[..., Path], texts: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("backend: quanto\nwieght: int2\n")
    assert "did you mean 'weights'?" in fails("compare", classifier(), "--data", texts, "--recipe", wrong)
    line = fails("compare", classifier(), "--data", texts, "--save-recipe", tmp_path / "r.yaml")
    assert "a recipe has one --weights, and this command has int2, int4, int8" in line
    assert "is no folder with a split model" in fails("recipe", tmp_path / "nowhere")


def test_a_recipe_is_not_written_over_what_is_read(fails, texts, tmp_path):
    before = Path(texts).read_bytes()
    assert "is an input of this command" in fails("compare", tmp_path, "--data", texts, "--save-recipe", texts)
    (tmp_path / "config.json").write_text("{}")
    line = fails("quantize", tmp_path, "--output", tmp_path / "out", "--save-recipe", tmp_path / "config.json")
    assert "is an input of this command" in line
    assert (tmp_path / "config.json").read_text() == "{}"
    assert Path(texts).read_bytes() == before
    both = tmp_path / "both"
    for output in ("--json", "--html"):
        assert "both write" in fails("compare", tmp_path, "--data", texts, "--save-recipe", both, output, both)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weights: int2\n")
    for output in ("--json", "--html"):
        line = fails("compare", tmp_path / "model", "--data", texts, "--recipe", recipe, output, recipe)
        assert "recipe.yaml is an input of this command" in line
    assert recipe.read_text() == "weights: int2\n"
