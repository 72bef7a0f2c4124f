from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from splitquant_plugins.cli.demo import demo
from splitquant_plugins.demo.corpus import DEPARTMENTS, LABELS, make_corpus
from splitquant_plugins.demo.findings import findings, half_interval
from splitquant_plugins.demo.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from splitquant_plugins.errors import ConfigError, MissingExtraError
from splitquant_plugins.plugins import Plugins


def test_corpus_follows_from_its_seed() -> None:
    assert make_corpus(50, 3) == make_corpus(50, 3)
    assert make_corpus(50, 3) != make_corpus(50, 4)


def test_corpus_is_balanced_and_labels_say_who_is_mentioned_most() -> None:
    notes = make_corpus(3000, 0)
    counts = torch.bincount(torch.tensor([note.label for note in notes]), minlength=len(LABELS))
    assert counts.min() > 400
    department_of = {word: number for number, words in enumerate(DEPARTMENTS.values()) for word in words.split()}
    right = 0
    for note in notes:
        mentions = [department_of[word] for word in note.text.split() if word in department_of]
        right += max(set(mentions), key=mentions.count, default=-1) == note.label
    assert 0.8 < right / len(notes) < 0.99  # misspelled words leave some notes open


def test_no_word_belongs_to_two_departments() -> None:
    words = [word for words in DEPARTMENTS.values() for word in words.split()]
    assert len(words) == len(set(words))


def test_vocabulary_encodes_as_a_tokenizer_does() -> None:
    vocabulary = Vocabulary(["red green", "red blue"], least=2)
    assert len(vocabulary) == 5
    encoded = vocabulary(["red", "green red red"], max_length=4)
    assert encoded["input_ids"].tolist() == [[START, 4, END, PAD], [START, UNKNOWN, 4, END]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def rows(plain: float, split: float) -> list[dict[str, Any]]:
    return [row_of("none", plain), row_of("auto", split)]


def row_of(split: str, accuracy: float, weights: str = "int2", granularity: str = "tensor") -> dict[str, Any]:
    return {
        "fp32_accuracy": 0.9,
        "n": 2000,
        "backend": "simulated",
        "weights": weights,
        "granularity": granularity,
        "scheme": "symmetric",
        "split": split,
        "accuracy": accuracy,
        "weight_sqnr_db": 5.0,
    }


@pytest.mark.parametrize(
    ("plain", "split", "verdict"),
    [
        (0.75, 0.899, "the split wins back all of it but noise"),
        (0.60, 0.80, "the split wins back part of it"),
        (0.895, 0.90, "no accuracy for a split to win back"),
        (0.895, 0.80, "the split does harm"),
        (0.75, 0.755, "the split does not help"),
        (0.75, 0.70, "the split does not help"),
    ],
)
def test_findings_say_what_the_rows_say(plain: float, split: float, verdict: str) -> None:
    (sentence,) = findings(rows(plain, split))
    assert verdict in sentence


def test_the_largest_gain_comes_last_whatever_the_order_of_the_rows() -> None:
    found = [*rows(0.5, 0.9), row_of("none", 0.9, granularity="channel"), row_of("auto", 0.9, granularity="channel")]
    assert [sentence.partition(":")[0] for sentence in findings(found)] == [
        "INT2 per channel, symmetric (simulated)",
        "INT2 per tensor, symmetric (simulated)",
    ]


def test_the_picture_is_a_png_of_all_targets(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from splitquant_plugins.demo.picture import draw_accuracy

    target = tmp_path / "picture.png"
    draw_accuracy(target, rows(0.5, 0.9))
    one = target.read_bytes()
    assert one.startswith(b"\x89PNG")
    draw_accuracy(target, rows(0.6, 0.9))
    assert target.read_bytes() != one


def test_noise_is_the_interval_of_an_accuracy() -> None:
    assert half_interval(0.5, 100) == pytest.approx(0.098)
    assert half_interval(1.0, 100) == 0


def test_quick_demo_prints_and_writes_every_row(plugins: Plugins, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    pytest.importorskip("matplotlib")
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    target, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    options = ["--quick", "--json", str(target), "--picture", str(picture)]
    result = CliRunner().invoke(demo, options, obj=plugins, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(target.read_text())
    targets = [("quanto", "int2", "channel"), ("quanto", "int4", "channel"), ("simulated", "int2", "tensor")]
    assert [(row["backend"], row["weights"], row["granularity"], row["split"]) for row in found] == [
        (*one, split) for one in targets for split in ("none", "auto")
    ]
    for row in found:
        assert row["n"] == 100
        assert row["layers_quantized"] == 14 * row["k"]
        assert row["versions"]["torch"] == torch.__version__
    assert found[1]["linear_bits_per_weight"] == pytest.approx(3 * found[0]["linear_bits_per_weight"])
    for text in ("seed 0", "n = 100", "INT2 per tensor, symmetric", "INT4 per channel", "Storage:", "optimum-quanto "):
        assert text in result.output
    assert str(picture) in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_same_seed_trains_the_same_model() -> None:
    pytest.importorskip("transformers")
    from splitquant_plugins.demo.subject import train_subject

    sizes = {"train_rows": 64, "test_rows": 10, "steps": 2}
    first, second, third = (torch.cat(list(train_subject(seed, **sizes)[0].logits)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_training_lowers_the_loss() -> None:
    pytest.importorskip("transformers")
    from splitquant_plugins.demo.training import bert_tiny, train

    inputs = {"input_ids": torch.tensor([[2, 4, 3], [2, 5, 3]] * 16), "attention_mask": torch.ones(32, 3).long()}
    labels = torch.tensor([0, 1] * 16)
    model = train(bert_tiny(6, 2), inputs, labels, steps=30, seed=0)
    assert not model.training
    with torch.no_grad():
        assert (model(**inputs).logits.argmax(-1) == labels).all()


def test_missing_transformers_names_the_extra(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    result = CliRunner().invoke(demo, ["--quick"], obj=plugins)
    assert isinstance(result.exception, MissingExtraError)
    assert "splitquant-plugins[" in str(result.exception)


def test_without_the_quanto_plugin_the_error_lists_what_there_is() -> None:
    pytest.importorskip("transformers")
    bare = Plugins()
    result = CliRunner().invoke(demo, ["--quick"], obj=bare)
    assert isinstance(result.exception, ConfigError)
    assert "unknown backend 'quanto'" in str(result.exception)
