"""compare, inspect and quantize on language models, image classifiers and modules; mistakes are one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitquant_plugins.cli.main import run

SIMULATED = ["--backend", "simulated", "--weights", "int2"]
LANGUAGE_FIELDS = ("perplexity", "fp32_perplexity", "kl", "tokens")


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def rows(command: str, model: object, *arguments: object) -> list[dict[str, Any]]:
        path = tmp_path / "rows.json"
        assert run([command, str(model), *map(str, arguments), "--json", str(path)]) == 0
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found

    return rows


@pytest.mark.parametrize("tied", [False, True])
def test_compare_a_language_model(tied: bool, language_model: Any, documents: Path, rows_of: Any, capsys) -> None:
    folder = language_model(tied=tied)
    plain, split = rows_of("compare", folder, "--data", documents, *SIMULATED, "--split", "none,grid", "--stride", 9)
    for row in (plain, split):
        assert (row["task"], row["n"], row["ignored"]) == ("language-model", 6, ["lm_head"])
        assert (row["accuracy"], row["fp32_accuracy"]) == (None, None)
        assert all(row[name] > 0 for name in LANGUAGE_FIELDS)
        assert row["layers_quantized"] == 7 * row["k"]
    assert split["kl"] < plain["kl"]
    assert split["agreement"] > plain["agreement"]
    said = capsys.readouterr().out
    assert "perplexity" in said
    assert said.count("the head of a language model") == 1
    if not tied:
        reasons = {each["tensor"]: each["reason"] for each in plain["left_float"]}
        assert "--head quantizes it" in reasons["lm_head.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_quantized_and_split_where_it_is_asked_for(
    tied: bool, language_model: Any, documents: Path, rows_of: Any
) -> None:
    folder = language_model(tied=tied)
    plain, split = rows_of("compare", folder, "--data", documents, *SIMULATED, "--split", "none,kmeans", "--head")
    assert (plain["ignored"], plain["layers_quantized"]) == ([], 8)
    assert (split["ignored"], split["layers_split"], split["layers_quantized"]) == ([], 8, 24)


def test_gates_of_language_models(language_model: Any, documents: Path, capsys, fails: Any) -> None:
    common = ["compare", str(language_model()), "--data", str(documents), *SIMULATED, "--split", "none"]
    assert (
        run([*common, "--fail-above", "perplexity=1e6", "--fail-above", "kl=100", "--fail-below", "agreement=0"]) == 0
    )
    assert run([*common, "--fail-above", "perplexity=1"]) == 1
    assert "is above 1" in capsys.readouterr().err
    assert "a language-model has no accuracy to fail by; choose from agreement" in fails(
        *common, "--fail-below", "accuracy=50"
    )
    assert "less perplexity is better; write --fail-above perplexity=3" in fails(
        *common, "--fail-below", "perplexity=3"
    )
    assert "with one of perplexity, kl" in fails(*common, "--fail-above", "accuracy=3")


def test_compare_a_module(module_file: Path, rows_of: Any, capsys) -> None:
    model, data = f"{module_file}:load", f"{module_file}:test"
    plain, split = rows_of("compare", model, "--data", data, *SIMULATED, "--split", "none,grid", "--limit", 17)
    assert (split["task"], split["n"], split["ignored"]) == ("module", 17, [])
    assert (plain["fp32_accuracy"], split["accuracy"] >= plain["accuracy"]) == (1.0, True)
    assert all(split[name] is None for name in LANGUAGE_FIELDS)
    assert split["layers_split"] == 2
    (row,) = rows_of("compare", model, "--data", f"{module_file}:inputs", *SIMULATED, "--split", "none")
    assert (row["accuracy"], row["fp32_accuracy"]) == (None, None)
    assert row["agreement"] is not None
    assert "n = 20, without labels" in capsys.readouterr().out
    calibrated = ["--split", "grid", "--calibration", f"{module_file}:inputs", "--method", "rtn,decoupleq"]
    rows = rows_of("compare", model, "--data", data, *SIMULATED, *calibrated, "--k", 2)
    assert [row["layers_solved"] for row in rows] == [0, 2]


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_pt2e_runs_a_module_on_batches_of_any_size(module_file: Path, rows_of: Any) -> None:
    pytest.importorskip("torchao")
    text = "\ndef one():\n    return inputs()[:1]\n\ndef many():\n    return inputs().repeat(7, 1, 1, 1)[:129]\n"
    module_file.write_text(module_file.read_text() + text)
    for data in ("one", "many"):
        arguments = ["--data", f"{module_file}:{data}", "--backend", "pt2e", "--weights", "int8", "--split", "none"]
        (row,) = rows_of("compare", f"{module_file}:load", *arguments)
        assert row["agreement"] > 0.9


def test_compare_an_image_classifier(models: Any, tmp_path: Path, rows_of: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    models.resnet(num_labels=2).save_pretrained(tmp_path / "resnet")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
    for number, name in enumerate(("LABEL_0", "LABEL_1")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        image.new("RGB", (16, 16), (100 * number, 9, 9)).save(tmp_path / "pictures" / name / "a.png")
    model, data = tmp_path / "resnet", tmp_path / "pictures"
    int8 = ["--backend", "simulated", "--weights", "int8"]
    plain, split = rows_of("compare", model, "--data", data, *int8, "--split", "none,kmeans")
    assert (split["task"], split["n"]) == ("image-classification", 2)
    # BatchNorms are folded for the split row alone: its weights are measured beside the folded ones.
    assert split["weight_sqnr_db"] > plain["weight_sqnr_db"] > 20
    (row,) = rows_of("quantize", model, *int8[2:], "--backend", "quanto", "--output", tmp_path / "out")
    assert row["task"] == "image-classification"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_inspect_other_kinds(language_model: Any, module_file: Path, rows_of: Any, capsys) -> None:
    rows = rows_of("inspect", language_model(), "--splitter", "kmeans")
    assert len(rows) == 7
    assert "lm_head stays float" in capsys.readouterr().out
    rows = rows_of("inspect", language_model("tied", tied=True), "--splitter", "kmeans", "--head")
    assert [row["layer"] for row in rows][-1] == "lm_head"
    rows = rows_of("inspect", f"{module_file}:load", "--splitter", "kmeans")
    assert [row["layer"] for row in rows] == ["conv", "linear"]


def test_quantize_other_kinds(language_model: Any, module_file: Path, tmp_path: Path, rows_of: Any, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimum.quanto")
    common = ["--weights", "int4", "--split", "kmeans"]
    (row,) = rows_of("quantize", language_model(), *common, "--output", tmp_path / "out")
    assert (row["task"], row["ignored"], row["layers_split"]) == ("language-model", ["lm_head"], 7)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.lm_head).__name__ == "Linear"
    (row,) = rows_of("quantize", f"{module_file}:load", *common, "--output", tmp_path / "module")
    assert (row["task"], row["layers_split"]) == ("module", 2)
    assert "no tokenizer files" not in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_head_stays_float_unless_it_is_asked_for(
    tied: bool, language_model: Any, tmp_path: Path, rows_of: Any, capsys
) -> None:
    pytest.importorskip("optimum.quanto")
    common = ["quantize", language_model(tied=tied), "--stream", "--split", "kmeans", "--output"]
    (row,) = rows_of(*common, tmp_path / "out")
    assert (row["streamed"], row["ignored"], row["layers_split"]) == (True, ["lm_head"], 7)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lm_head")]
    assert "--head quantizes it" in line
    (row,) = rows_of(*common, tmp_path / "head", "--head")
    assert (row["streamed"], row["ignored"], row["layers_split"]) == (True, [], 8)
    assert "lm_head" not in capsys.readouterr().out


def test_quantize_a_module_with_a_backend_that_traces_it(
    module_file: Path, tmp_path: Path, rows_of: Any, fails
) -> None:
    pytest.importorskip("torchao")
    common = ["--backend", "pt2e", "--weights", "int8", "--split", "kmeans", "--output", tmp_path / "out"]
    assert "give an example batch of its inputs, as --calibration" in fails("quantize", f"{module_file}:load", *common)
    (row,) = rows_of("quantize", f"{module_file}:load", *common, "--calibration", f"{module_file}:inputs")
    assert row["layers_split"] == 2


def test_mistakes_are_one_line(language_model: Any, module_file: Path, documents: Path, tmp_path: Path, fails) -> None:
    (tmp_path / "words.csv").write_text("words\nw1 w2\n")
    folder = language_model()
    language = ["compare", folder, *SIMULATED, "--data"]
    assert "has no column text" in fails(*language, tmp_path / "words.csv")
    assert "no such data" in fails(*language, tmp_path / "absent.txt")
    assert "has 16 positions" in fails(*language, documents, "--context", 32)
    assert "predicts 1 to 7" in fails(*language, documents, "--context", 8, "--stride", 8)
    assert "no such data" in fails(*language, documents, "--calibration", tmp_path / "absent.txt")
    assert "no such file" in fails("compare", tmp_path / "absent.py:load", *SIMULATED, "--data", f"{module_file}:test")
    model = f"{module_file}:load"
    assert "has no function 'nothing'" in fails("compare", model, "--data", f"{module_file}:nothing")
    assert "20 inputs and 2 labels" in fails("compare", model, *SIMULATED, "--data", f"{module_file}:few_labels")
    assert "--context is for language models" in fails("compare", model, "--data", model, "--context", 4)
    assert "has to return a torch.nn.Module" in fails("inspect", f"{module_file}:inputs")
    assert "give FILE.py:FUNCTION" in fails("inspect", module_file)
    assert "functions give data for modules" in fails(*language, f"{module_file}:inputs")
    assert "an input of this command" in fails("inspect", model, "--json", module_file)


def test_other_models_are_named(models: Any, tmp_path: Path, documents: Path, fails: Any) -> None:
    models.t5().save_pretrained(tmp_path / "t5")
    assert "T5ForConditionalGeneration: text classifiers, causal language models" in fails(
        "compare", tmp_path / "t5", *SIMULATED, "--data", documents
    )


def test_recipes_carry_the_options(language_model: Any, documents: Path, tmp_path: Path, rows_of: Any) -> None:
    recipe, folder = tmp_path / "recipe.yaml", language_model()
    common = ["compare", folder, "--data", documents]
    given = ["--context", 8, "--stride", 3, "--head", "--split", "kmeans", "--k", 2]
    (row,) = rows_of(*common, *SIMULATED, *given, "--save-recipe", recipe)
    assert all(line in recipe.read_text() for line in ("context: 8\n", "stride: 3\n", "head: true\n"))
    again = rows_of(*common, "--recipe", recipe)[-1]
    assert [again[key] for key in ("tokens", "perplexity", "ignored")] == [
        row[key] for key in ("tokens", "perplexity", "ignored")
    ]
    output, saved = tmp_path / "out", tmp_path / "again.yaml"
    arguments = ["--backend", "quanto", "--recipe", recipe, "--save-recipe", saved, "--output", output]
    (made,) = rows_of("quantize", folder, *arguments)
    assert made["ignored"] == []
    assert json.loads((output / "splitquant_manifest.json").read_text())["recipe"]["head"] is True
    assert "stride: 3\n" in saved.read_text()


def test_a_recipe_alone_runs_no_file(module_file: Path, tmp_path: Path, rows_of: Any, fails: Any) -> None:
    other = tmp_path / "other.py"
    other.write_text("raise RuntimeError('was run')\n")
    recipe = tmp_path / "recipe.yaml"
    model, data = f"{module_file}:load", f"{module_file}:test"
    common = [model, "--data", data, *SIMULATED, "--recipe", recipe]
    recipe.write_text("split: {splitter: grid, k: 2}\ncalibration: other.py:inputs\n")
    assert "only files that the command line names are run" in fails("compare", *common)
    assert "was run" in fails("compare", *common, "--calibration", f"{other}:inputs")
    recipe.write_text(f"split: {{splitter: grid, k: 2}}\ncalibration: {module_file.name}:inputs\n")
    assert rows_of("compare", *common)[-1]["layers_split"] == 2


def test_pages_of_a_comparison_and_of_an_inspection(module_file: Path, tmp_path: Path, rows_of: Any, fails) -> None:
    model, page = f"{module_file}:load", tmp_path / "page.html"
    common = ["--data", f"{module_file}:test", *SIMULATED, "--split", "none,grid"]
    rows = rows_of("compare", model, *common, "--html", page)
    assert [[each["layer"] for each in row["layers"]] for row in rows] == [["conv", "linear"]] * 2
    assert "FP32 accuracy 100.00 %" in page.read_text()
    rows_of("inspect", model, "--splitter", "kmeans", "--html", page, "--curve")
    assert "splitter kmeans" in page.read_text()
    assert "an input of this command" in fails("compare", model, *common, "--html", module_file)
    assert "--json and --html both write" in fails("compare", model, *common, "--html", page, "--json", page)
    assert "both write" in fails("inspect", model, "--html", page, "--picture", page)
