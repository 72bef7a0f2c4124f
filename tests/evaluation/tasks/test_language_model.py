"""Language models: windows, batches, the head, and figures that agree with the model run by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.evaluation.scores import NOT_COUNTED
from splitquant_plugins.evaluation.subject import load_task_subject
from splitquant_plugins.evaluation.tasks.choose import task_of
from splitquant_plugins.evaluation.tasks.language_model import HEAD_REASON, LanguageModel, windows


@pytest.mark.parametrize("length", range(26))
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 7), (8, 1), (2, 1), (5, 3)])
def test_every_token_but_the_first_is_predicted_once(length: int, context: int, stride: int) -> None:
    tokens = list(range(length))
    predicted = []
    for number, window in enumerate(windows(tokens, context, stride)):
        assert len(window.tokens) <= context
        assert number == 0 or len(window.tokens) == context
        assert number == 0 or window.first >= context - stride
        predicted += window.tokens[window.first :]
    assert predicted == tokens[1:]


def load(folder: Path, **options: Any) -> LanguageModel:
    task = task_of(str(folder), **options)
    assert isinstance(task, LanguageModel)
    return task


def test_the_context_is_the_models_and_long_ones_are_cut(language_model: Any) -> None:
    task = load(language_model())
    assert (task.context, task.stride) == (16, 8)
    assert load(language_model("long", max_position_embeddings=100_000)).context == 2048
    task = load(language_model(), context=6, stride=2)
    assert (task.context, task.stride) == (6, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 17}, "has 16 positions"), ({"stride": 16}, "predicts 1 to 15"), ({"context": 1}, "at least 2")],
)
def test_windows_that_are_none(options: Any, message: str, language_model: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load(language_model(), **options)


def test_options_of_language_models_are_refused_elsewhere(module_file: Path) -> None:
    with pytest.raises(ConfigError, match="--stride is for language models"):
        task_of(f"{module_file}:load", stride=3)
    with pytest.raises(ConfigError, match="--head is for language models"):
        task_of(f"{module_file}:load", head=True)


def test_figures_are_those_of_the_documents_one_by_one(language_model: Any, documents: Path) -> None:
    task = load(language_model(), context=16, stride=4)
    subject = load_task_subject(task, str(documents))
    lengths = [batch["input_ids"].shape[1] for batch in subject.examples.batches]
    assert lengths == sorted(lengths, reverse=True)
    surprise, count = 0.0, 0
    for line in documents.read_text().split("\n")[:-2]:
        ids = [int(word[1:]) for word in line.split()]
        for end in range(1, len(ids)):
            # What a window of 16 that predicts 4 sees before this token.
            start = 0 if end < 16 else min(16 + 4 * ((end - 16) // 4 + 1), len(ids)) - 16
            logits = subject.model(torch.tensor([ids[start:end]])).logits[0, -1].double()
            surprise -= float(logits.log_softmax(-1)[ids[end]].detach())
            count += 1
    assert subject.figures["tokens"] == count
    assert subject.figures["perplexity"] == pytest.approx(math.exp(surprise / count), rel=1e-5)
    assert (subject.figures["kl"], subject.figures["agreement"]) == (0.0, 1.0)
    counted = sum(int((target != NOT_COUNTED).sum()) for target in subject.examples.targets or ())
    assert counted == count
    assert subject.examples.count == 6


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_float_unless_it_is_asked_for(tied: bool, language_model: Any) -> None:
    folder = language_model(tied=tied)
    task = load(folder)
    assert task.stays_float(task.load_model()) == ("lm_head",)
    assert load(folder, head=True).stays_float(task.load_model()) == ()
    assert "--head" in HEAD_REASON


def test_documents_without_tokens_to_predict(language_model: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1\nw2\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    task = load(language_model())
    with pytest.raises(InputError, match="no document of two tokens"):
        task.examples(str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match="has no rows"):
        task.examples(str(tmp_path / "empty.txt"))
    (tmp_path / "high.txt").write_text("w1 w119\n")
    few = load(language_model("few", vocab_size=100))
    with pytest.raises(InputError, match="makes token 119, and the model embeds 100"):
        few.examples(str(tmp_path / "high.txt"))


def test_calibration_texts_are_cut_at_the_context(language_model: Any, documents: Path) -> None:
    batches = load(language_model(), context=5).calibration(str(documents), limit=4)
    assert sum(len(batch["input_ids"]) for batch in batches) == 4
    assert all(batch["input_ids"].shape[1] <= 5 for batch in batches)
    assert [int(row.sum()) for row in batches[0]["attention_mask"]] == [3, 5, 5, 5]
