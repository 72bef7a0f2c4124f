"""What outputs are measured by, on numbers small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.scores import LARGEST, NOT_COUNTED, ClassScore, TokenScore

# Four inputs, of labels 0, 1, 2, 2: the float model is right in three, the quantized one in two; they agree in one.
REFERENCE = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [5.0, 0.0, 1.0]])
LOGITS = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0], [0.0, 1.0, 5.0]])
LABELS = torch.tensor([0, 1, 2, 2])


def classes(reference: Tensor, logits: Tensor, target: Tensor | None, size: int = 3) -> dict:
    score = ClassScore()
    for number, (one, other) in enumerate(zip(reference.split(size), logits.split(size), strict=True)):
        score.add(one, other, None if target is None else target.split(size)[number])
    return score.figures()


def test_classes() -> None:
    found = classes(REFERENCE, LOGITS, LABELS)
    assert (found["accuracy"], found["agreement"]) == (2 / 4, 1 / 4)
    assert found["logit_sqnr_db"] == pytest.approx(10 * math.log10(58 / float((REFERENCE - LOGITS).square().sum())))
    assert classes(REFERENCE, REFERENCE, LABELS) == {"accuracy": 0.75, "agreement": 1.0, "logit_sqnr_db": 300.0}


def test_what_is_no_number_is_neither_right_nor_agreed_on() -> None:
    nothing = torch.full_like(LOGITS, torch.nan)
    found = classes(REFERENCE, nothing, torch.zeros(4, dtype=torch.int64))
    assert (found["accuracy"], found["agreement"], found["logit_sqnr_db"]) == (0.0, 0.0, -300.0)
    assert classes(nothing, nothing, None)["agreement"] == 0.0
    score = TokenScore()
    score.add(nothing[None], nothing[None], torch.zeros(1, 4, dtype=torch.int64))
    assert score.figures()["agreement"] == 0.0


def test_classes_without_labels_and_outputs_without_classes() -> None:
    assert classes(REFERENCE, LOGITS, None)["accuracy"] is None
    assert classes(REFERENCE, LOGITS, None)["agreement"] == 1 / 4
    found = classes(REFERENCE[:, :1], LOGITS[:, :1], None)
    assert (found["accuracy"], found["agreement"]) == (None, None)
    assert found["logit_sqnr_db"] == pytest.approx(10 * math.log10(34 / (4 + 1 + 25)))


def test_classes_of_every_pixel() -> None:
    maps = REFERENCE.t().reshape(1, 3, 2, 2)
    assert classes(maps, LOGITS.t().reshape(1, 3, 2, 2), LABELS.reshape(1, 2, 2))["accuracy"] == 2 / 4


def test_labels_that_do_not_fit_the_outputs() -> None:
    with pytest.raises(InputError, match="label 3 is none of the model's 3 classes"):
        classes(REFERENCE, LOGITS, LABELS + 1)
    with pytest.raises(InputError, match=r"go with labels \[4\], not \[4, 1\]"):
        classes(REFERENCE, LOGITS, LABELS[:, None], size=4)
    with pytest.raises(InputError, match=r"labels need outputs \[n, classes\]"):
        classes(REFERENCE[:, :1], LOGITS[:, :1], LABELS)


def test_tokens() -> None:
    reference = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [9.0, 9.0]]])
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0]]])
    score = TokenScore()
    score.add(reference, logits, torch.tensor([[1, 0, NOT_COUNTED]]))
    found = score.figures()
    assert found["tokens"] == 2
    assert found["perplexity"] == pytest.approx(math.exp(-(math.log(3 / 4) + math.log(1 / 4)) / 2))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert found["kl"] == pytest.approx((first + second) / 2)
    assert found["agreement"] == 0.0  # a tie goes to the first
    same = TokenScore()
    same.add(reference, reference, torch.tensor([[1, 0, NOT_COUNTED]]))
    assert same.figures()["kl"] == 0.0
    assert same.figures()["agreement"] == 1.0
    assert same.figures()["perplexity"] == pytest.approx(math.exp(-(math.log(1 / 2) + math.log(3 / 4)) / 2))


def test_figures_are_finite_whatever_the_model_computes() -> None:
    for value in (math.nan, math.inf, 1e30):
        score = TokenScore()
        score.add(torch.zeros(1, 1, 2), torch.tensor([[[value, 0.0]]]), torch.tensor([[1]]))
        found = score.figures()
        assert found["perplexity"] == LARGEST
        assert all(math.isfinite(number) for number in found.values())


def test_what_is_no_number_is_as_far_from_the_float_model_as_can_be() -> None:
    for value in (math.nan, math.inf, -math.inf):
        score = TokenScore()
        score.add(torch.zeros(1, 1, 2), torch.tensor([[[value, 0.0]]]), torch.tensor([[1]]))
        assert score.figures()["kl"] == LARGEST


def test_tokens_add_up_over_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reference, logits = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    target = torch.randint(4, (3, 5))
    target[1, 2] = NOT_COUNTED
    counted = target != NOT_COUNTED
    one, other = reference[counted].double(), logits[counted].double()
    expected = {
        "agreement": float((one.argmax(1) == other.argmax(1)).double().mean()),
        "logit_sqnr_db": float(10 * torch.log10(one.square().sum() / (one - other).square().sum())),
        "perplexity": math.exp(float(torch.nn.functional.cross_entropy(other, target[counted]))),
        "kl": float((one.softmax(1) * (one.log_softmax(1) - other.log_softmax(1))).sum() / 14),
        "tokens": 14,
    }
    assert 0 < expected["agreement"] < 1
    split, sizes = torch.split, []
    monkeypatch.setattr(torch, "split", lambda tensor, size: sizes.append(size) or split(tensor, size))
    for chunk, rows in ((1 << 22, 1 << 20), (8, 2), (1, 1)):
        monkeypatch.setattr("splitquant_plugins.evaluation.scores._CHUNK", chunk)
        sizes.clear()
        score = TokenScore()
        for number in range(3):
            score.add(reference[number : number + 1], logits[number : number + 1], target[number : number + 1])
        assert score.figures() == pytest.approx(expected)
        assert set(sizes) == {rows}


def test_two_classes_are_classes_and_one_is_none() -> None:
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert classes(pairs, pairs.flip(1), torch.tensor([0, 0]))["accuracy"] == 0.5
    assert classes(pairs, pairs.flip(1), None)["agreement"] == 0.0


def test_tokens_need_those_that_come_next() -> None:
    with pytest.raises(AssertionError, match=r"^tokens are measured by those that come next"):
        TokenScore().add(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), None)
