"""Text classifiers of transformers, on texts with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import load_classifier, load_tokenizer, max_length_of
from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.metrics import tokenize
from splitquant_plugins.evaluation.scores import ClassScore
from splitquant_plugins.evaluation.tasks.base import CALIBRATION_INPUTS, Examples, Kind
from splitquant_plugins.evaluation.tasks.transformers_model import TransformersModel
from splitquant_plugins.evaluation.texts import LabelledTexts, load_texts, load_unlabelled
from splitquant_plugins.passes.self_calibration import self_calibration

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

OWN_TEXT = "self"
_OWN_LENGTH = 256
CLASS_MEASURES = ("accuracy", "agreement", "logit_sqnr_db")
TEXT_CLASSIFICATION = Kind("text-classification", "accuracy", CLASS_MEASURES, ClassScore)


class TextModel(TransformersModel):
    """A transformers model that takes token ids: what all of them have in common."""

    has_tokenizer = True

    def calibration(self, source: str, limit: int = CALIBRATION_INPUTS) -> list[Batch]:
        """Tokenize the first texts; with the source `self` a causal language model writes as many of its own."""
        if source == OWN_TEXT:
            return list(self_calibration(self.load_model(), sequences=limit, length=self._length(_OWN_LENGTH)))
        texts = load_unlabelled(source, limit)
        batches = self._batches(texts, 32)
        self.refuse_unknown_tokens(batches)
        return list(batches)

    def _length(self, most: int = 512) -> int:
        """Tokens of the longest input."""
        return max_length_of(self.config, most)

    def _batches(self, texts: Sequence[str], size: int) -> list[dict[str, Tensor]]:
        return tokenize(load_tokenizer(self.model), texts, self._length(), batch_size=size)

    def example_batch(self, model: nn.Module) -> Batch:
        """Make token ids that the model embeds."""
        vocabulary = int(getattr(self.config, "vocab_size", None) or 2)
        ids = torch.arange(2 * 16).reshape(2, 16) % max(vocabulary, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def refuse_unknown_tokens(self, batches: Sequence[Batch]) -> None:
        """Raise InputError where a text holds a token that the model does not embed."""
        embedded = getattr(self.config, "vocab_size", None)
        for batch in batches:
            highest = int(batch["input_ids"].max())
            if embedded is not None and highest >= embedded:
                raise InputError(
                    f"the tokenizer of {self.model} makes token {highest}, and the model embeds {embedded}: they are "
                    "not of one model, or the model's embedding was not resized"
                )


class TextClassification(TextModel):
    """A sequence classifier, on a csv with the columns text,label or what else `rows.read_texts` takes."""

    kind = TEXT_CLASSIFICATION

    def __init__(self, model: str, *, by_length: bool = False) -> None:
        """`by_length` takes long texts first, so that batches hold little padding.

        The figures are the same but for rounding, and sooner there. Batches are then no fair sample of the texts,
        should a backend calibrate with the first of them.
        """
        super().__init__(model)
        self.by_length = by_length

    def load_model(self) -> nn.Module:
        """Load the model as a sequence classifier."""
        return load_classifier(self.model)

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Read labelled texts, and tokenize them."""
        tokenizer = load_tokenizer(self.model)
        texts = load_texts(data, self.label_numbers(), limit)
        if self.by_length:
            order = sorted(range(len(texts.texts)), key=lambda number: -len(texts.texts[number]))
            texts = replace(texts, texts=[texts.texts[n] for n in order], labels=[texts.labels[n] for n in order])
        batches = tokenize(tokenizer, texts.texts, self._length())
        self.refuse_unknown_tokens(batches)
        return labelled_batches(texts, batches)


class OtherTextModel(TextModel):
    """A transformers model of a kind that can be split and quantized, and that is not measured."""

    kind = Kind("other", "", (), ClassScore)

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Refuse."""
        names = getattr(self.config, "architectures", None)
        raise InputError(
            f"{self.model} is {' '.join(names or ['of no known kind'])}: text classifiers, causal language models and "
            "image classifiers are measured; for another model write a function that returns it, and give FILE.py:NAME"
        )


def labelled_batches(texts: LabelledTexts, batches: Sequence[Batch]) -> Examples:
    """Put tokenized texts and their labels together."""
    sizes = [len(batch["input_ids"]) for batch in batches]
    return Examples(texts.name, len(texts.labels), batches, torch.split(torch.tensor(texts.labels), sizes))
