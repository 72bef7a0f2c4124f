"""What outputs are measured by, added up batch by batch beside those of the float model."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.metrics import ratio_db

# Targets that are not counted, as PyTorch's cross entropy has it.
NOT_COUNTED = -100
# What stands for infinity and for what is no number, so that JSON can hold it.
LARGEST = 1e300
_CHUNK = 1 << 22  # values that are worked on at once in float64


class Score(Protocol):
    """Adds up batches; `figures` are the measures, None for one that the data or the outputs do not have."""

    def add(self, reference: Tensor, logits: Tensor, target: Tensor | None) -> None:
        """Take in a batch of the float model's logits, the quantized model's, and what would be right."""

    def figures(self) -> dict[str, float | int | None]:
        """Return the measures over all batches."""


class ClassScore:
    """Accuracy, agreement with the float model, and the signal-to-noise ratio of the logits in decibels.

    Logits are [n, classes, ...] with targets [n, ...], as PyTorch's cross entropy takes them. Without targets there is
    no accuracy, and without at least two classes there is no agreement. Logits with NaN among them are neither right
    nor agreed on.
    """

    def __init__(self) -> None:
        self._right = self._same = self._counted = self._labelled = 0
        self._signal = self._noise = 0.0

    def add(self, reference: Tensor, logits: Tensor, target: Tensor | None) -> None:
        """Take in a batch."""
        wide = reference.double()
        self._signal += float(wide.square().sum())
        self._noise += float((wide - logits.double()).square().sum())
        if not has_classes(reference):
            if target is not None:
                raise InputError(f"labels need outputs [n, classes], and the model's are {list(reference.shape)}")
            return
        predicted = _likeliest(logits, without=-1)
        if target is not None:
            _refuse_unfit(target, reference)
        self._same += int((predicted == _likeliest(reference, without=-2)).sum())
        self._counted += predicted.numel()
        if target is not None:
            self._right += int((predicted == target).sum())
            self._labelled += predicted.numel()

    def figures(self) -> dict[str, float | int | None]:
        """Return the measures over all batches."""
        return {
            "accuracy": self._right / self._labelled if self._labelled else None,
            "agreement": self._same / self._counted if self._counted else None,
            "logit_sqnr_db": ratio_db(self._signal, self._noise),
        }


class TokenScore:
    """Perplexity, mean Kullback-Leibler divergence from the float model in nats per token, and agreement.

    Logits are [batch, tokens, vocabulary], targets [batch, tokens] the token that comes next, `NOT_COUNTED` where it
    does not count. Agreement is the share of tokens of which both models hold the same to be the likeliest. The
    signal-to-noise ratio is that of the logits, in decibels.
    """

    def __init__(self) -> None:
        self._tokens = self._same = 0
        self._surprise = self._divergence = self._signal = self._noise = 0.0

    def add(self, reference: Tensor, logits: Tensor, target: Tensor | None) -> None:
        """Take in a batch."""
        assert target is not None, "tokens are measured by those that come next"
        counted = target != NOT_COUNTED
        rows = max(1, _CHUNK // reference.shape[-1])
        chunks = (torch.split(part, rows) for part in (reference[counted], logits[counted], target[counted]))
        for one, other, wanted in zip(*chunks, strict=True):
            before, after = one.double(), other.double()
            self._signal += float(before.square().sum())
            self._noise += float((before - after).square().sum())
            self._same += int((_likeliest(before, without=-2) == _likeliest(after, without=-1)).sum())
            before, after = before.log_softmax(1), after.log_softmax(1)
            self._surprise -= float(after.gather(1, wanted[:, None]).sum())
            self._divergence += float(torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True))
            self._tokens += len(wanted)

    def figures(self) -> dict[str, float | int | None]:
        """Return the measures over all batches."""
        mean = self._surprise / self._tokens
        return {
            "agreement": self._same / self._tokens,
            "logit_sqnr_db": ratio_db(self._signal, self._noise),
            "perplexity": math.exp(mean) if mean < math.log(LARGEST) else LARGEST,
            "kl": max(0.0, _finite(self._divergence / self._tokens)),  # max(0, NaN) is 0
            "tokens": self._tokens,
        }


def _likeliest(logits: Tensor, without: int) -> Tensor:
    """The class with the largest logit; `without` where one is no number, which argmax would take for the largest."""
    return logits.argmax(1).masked_fill_(logits.isnan().any(1), without)


def has_classes(logits: Tensor) -> bool:
    """Whether outputs say one of several classes, [n, classes, ...]."""
    return logits.ndim >= 2 and logits.shape[1] >= 2


def _refuse_unfit(target: Tensor, logits: Tensor) -> None:
    wanted = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != wanted:
        raise InputError(
            f"outputs {list(logits.shape)} are [n, classes, ...], and go with labels {list(wanted)}, not "
            f"{list(target.shape)}"
        )
    if int(target.max()) >= logits.shape[1]:
        raise InputError(f"label {int(target.max())} is none of the model's {logits.shape[1]} classes, 0 and up")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LARGEST
