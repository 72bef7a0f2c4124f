"""Mistakes at the command line are one line each, and are found before the work starts."""

from __future__ import annotations

import csv
import json
import os

import pytest
from rich.console import Console

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.tables import print_table
from splitquant_plugins.evaluation.texts import load_texts

pytest.importorskip("transformers")
LABELS = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.fixture
def compares(classifier, texts, fails):
    """Return what makes a mistaken comparison on the simulated backend, and its one line."""

    def run(*extra, data=None, model=None, **options):
        folder = model or classifier(**options)
        arguments = ["--backend", "simulated", "--weights", "int4", "--split", "kmeans"]
        return fails("compare", str(folder), "--data", str(data or texts), *arguments, *map(str, extra))

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a model is loaded."""

    def load(*_, **__):
        pytest.fail("a model was loaded before the mistake was found")

    monkeypatch.setattr("splitquant_plugins.checkpoints.transformers_models._loaded_whole", load)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "0"])
def test_c3_budgets_that_are_no_budgets(compares, value):
    assert "budget" in compares("--budget", value)


@pytest.mark.usefixtures("no_work")
def test_options_that_contradict_each_other(compares):
    assert "write --k 2" in compares("--k", 3, "-O", "k=2")
    assert "write --seed 1" in compares("-O", "seed=1")
    assert "given twice" in compares("-O", "split_bias=true", "-O", "split_bias=false")


@pytest.mark.usefixtures("no_work")
def test_json_paths_are_checked_first(compares, texts, tmp_path):
    (tmp_path / "link").symlink_to(texts)
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        ("/dev/null", "device"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "pipe", "pipe"),
        (tmp_path, "folder"),
        (texts / "below.json", "not a folder"),
        (texts, "an input"),
    ):
        assert message in compares("--json", path), path
    assert texts.read_text().startswith("text,label")


@pytest.mark.usefixtures("no_work")
def test_c4_outputs_are_checked_first(classifier, fails, tmp_path, monkeypatch):
    folder = str(classifier())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for output in (".", "..", str(tmp_path / "link"), "/dev/null", f"{folder}/config.json/x"):
        assert output.rstrip("/x") in fails("quantize", folder, "--output", output), output
    assert (tmp_path / "link").is_symlink()


def test_w6_rows_with_a_field_too_many_or_too_few(compares, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("text,label\nw1, w2,0\n")
    assert "line 2: 3 fields" in compares(data=data)
    data.write_text("text,label,more\nw1,0\n")
    assert "line 2: a field is missing" in compares(data=data)


def test_a_column_that_is_there_twice(compares, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("label,text,label\n1,w1,2\n")
    assert "the column 'label' twice" in compares(data=data)


def test_a_model_that_is_no_folder(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert "pipe is no folder" in fails("quantize", "pipe", "--output", "out")


def test_long_fields_are_read(tmp_path):
    text = "w1 " * 60_000
    (tmp_path / "long.csv").write_text(f"text,label\n{text},0\n")
    limit = csv.field_size_limit()
    assert load_texts(str(tmp_path / "long.csv"), LABELS).texts == [text]
    assert csv.field_size_limit() == limit


def test_c3_a_tokenizer_larger_than_the_embedding(compares):
    assert "makes token" in compares(vocab_size=12)


def test_c3_a_tokenizer_without_padding(classifier, compares):
    folder = classifier()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "pad_token": None, "model_max_length": 32})
    )
    assert "no padding token" in compares(model=folder)


def test_c3_positions_behind_the_padding_token():
    """RoBERTa's positions start at 2: of 34, a text can use 32."""
    import transformers

    from splitquant_plugins.checkpoints.transformers_models import max_length_of

    config = transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1)
    assert max_length_of(config) == 32
    assert max_length_of(transformers.BertConfig(max_position_embeddings=34)) == 34
    assert max_length_of(transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512


def test_piped_tables_are_as_wide_as_columns_says(capsys, monkeypatch):
    rows = [{"name": "x" * 150}]
    for columns, widest in (("60", 60), ("", 200)):
        monkeypatch.setenv("COLUMNS", columns)
        print_table("t", rows, [("name", "name", str)], Console())
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= widest
        assert (widest == 200) == any("x" * 150 in line for line in lines)


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(classifier, texts, fails, tmp_path, monkeypatch):
    folder, marker = classifier(), tmp_path / "ran"
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    path = folder / "config.json"
    names = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "code.Thing")
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "thing", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    said = fails("compare", folder, "--data", texts, "--backend", "simulated", "--weights", "int4", "--split", "none")
    assert "custom code" in said
    assert not marker.exists()


def test_names_of_layers_and_files_are_no_markup(capsys):
    print_table("[b]net[-b].py", [{"layer": "[/b]x[bold]"}], (("layer", "layer", str),))
    shown = capsys.readouterr().out
    assert "[b]net[-b].py" in shown
    assert "[/b]x[bold]" in shown


@pytest.mark.parametrize("label", [1.7, float("inf"), float("nan")])
def test_labels_are_whole_numbers(label, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "w1", "label": 1.0}) + "\n")
    assert load_texts(str(path), LABELS).labels == [1]
    path.write_text(json.dumps({"text": "w1", "label": label}) + "\n")
    with pytest.raises(InputError, match=rf"row 1: label {label} is not one of the model's 0 to 2"):
        load_texts(str(path), LABELS)
