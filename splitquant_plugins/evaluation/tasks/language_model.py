"""Causal language models of transformers, on documents: perplexity, and divergence from the float model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import load_tokenizer, max_length_of
from splitquant_plugins.errors import ConfigError, InputError, first_line
from splitquant_plugins.evaluation.scores import NOT_COUNTED, TokenScore
from splitquant_plugins.evaluation.tasks.base import Examples, Kind
from splitquant_plugins.evaluation.tasks.text_classification import TextModel
from splitquant_plugins.evaluation.texts import load_unlabelled

if TYPE_CHECKING:
    from splitquant_plugins.backends import Batch

LANGUAGE_MODEL = Kind(
    "language-model", "perplexity", ("agreement", "logit_sqnr_db", "perplexity", "kl", "tokens"), TokenScore
)
HEAD_REASON = (
    "the head of a language model, and an embedding that shares its weight, stay float, as transformers leaves them by "
    "default; --head quantizes it"
)
# Models take more than a test needs: without --context a window has at most this many tokens.
LONGEST_WINDOW = 2048
_UNLIMITED = 2**31
# Logits of a batch, and rows.
_BATCH_VALUES, _BATCH_ROWS = 1 << 25, 32


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document. Those from `first` on are predicted, the ones before are their context."""

    tokens: Sequence[int]
    first: int


class LanguageModel(TextModel):
    """A causal language model, on documents: the lines of a text file, or a column text.

    A document of more than `context` tokens is read in windows of that many, each of which predicts the `stride`
    tokens behind those that the window before it did. With `head`, the output layer is quantized too.
    """

    kind = LANGUAGE_MODEL

    def __init__(
        self, model: str, *, context: int | None = None, stride: int | None = None, head: bool = False
    ) -> None:
        super().__init__(model)
        positions = max_length_of(self.config, _UNLIMITED)
        if context is not None and context > positions:
            raise ConfigError(f"--context {context}: {model} has {positions} positions; choose at most as many")
        if context is not None and context < 2:
            raise ConfigError(f"--context {context}: a window of at least 2 tokens has one to predict")
        self.given_context = context
        self.context = context or min(positions, LONGEST_WINDOW)
        self.stride = stride or max(1, self.context // 2)
        if not 1 <= self.stride < self.context:
            raise ConfigError(
                f"--stride {stride}: a window of {self.context} tokens predicts 1 to {self.context - 1} of them"
            )
        self.head = head

    def check_options(self, **options: object) -> None:
        """Take them all: they were checked when they came in."""

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """Read documents, and cut them into windows, batched by length with the longest first."""
        texts = load_unlabelled(data, limit)
        found = [window for ids in self._encoded(texts) for window in windows(ids, self.context, self.stride)]
        if not found:
            raise InputError(f"{data} has no document of two tokens, and so none to predict")
        found.sort(key=lambda window: -len(window.tokens))
        grouped = list(_grouped(found, int(getattr(self.config, "vocab_size", None) or 1)))
        batches: list[Batch] = [padded([window.tokens for window in group]) for group in grouped]
        self.refuse_unknown_tokens(batches)
        return Examples(data, len(texts), batches, [_targets(group) for group in grouped])

    def stays_float(self, model: nn.Module) -> tuple[str, ...]:
        """Name the head, unless it was asked for."""
        head = None if self.head else head_of(model)
        return () if head is None else (head,)

    def _length(self, most: int = 512) -> int:
        return self.given_context or super()._length(most)

    def _batches(self, texts: Sequence[str], size: int) -> list[dict[str, Tensor]]:
        cut = [ids[: self._length()] for ids in self._encoded(texts)]
        cut = [ids for ids in cut if ids]
        if not cut:
            raise InputError("the calibration texts have no tokens")
        return [padded(cut[start : start + size]) for start in range(0, len(cut), size)]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = load_tokenizer(self.model, padding=False)
        try:
            found: Any = tokenizer(list(texts), verbose=False)["input_ids"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the tokenizer of {self.model} cannot be used: {first_line(error)}") from None
        return [list(map(int, ids)) for ids in found]


def head_of(model: nn.Module) -> str | None:
    """The name of a language model's output layer; None where it says none."""
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        next((name for name, module in model.named_modules() if module is found), None) if found is not None else None
    )


def head_sentences(row: Mapping[str, Any]) -> list[str]:
    """Say of a row's heads that they stay float, where its coverage does not: tied ones count as their embedding."""
    named = {each["tensor"].rpartition(".")[0] for each in row["left_float"]}
    return [f"{name} stays float: {HEAD_REASON}" for name in row["ignored"] if name not in named]


def windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows of at most `context` tokens that predict each token but the first once.

    All windows behind the first are as long as `context`, and predict `stride` tokens, the last perhaps fewer. A
    document of a single token has none.
    """
    end = min(len(tokens), context)
    if end > 1:
        yield Window(tokens[:end], 1)
    while end < len(tokens):
        last, end = end, min(end + stride, len(tokens))
        yield Window(tokens[end - context : end], context - (end - last))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token ids with their attention mask, padded behind, where no token before sees it."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _targets(group: Sequence[Window]) -> Tensor:
    """The token that comes next, at each place of a batch."""
    targets = torch.full((len(group), len(group[0].tokens)), NOT_COUNTED)
    for number, window in enumerate(group):
        end = len(window.tokens)
        targets[number, window.first - 1 : end - 1] = torch.tensor(window.tokens[window.first : end])
    return targets


def _grouped(found: Sequence[Window], vocabulary: int) -> Iterator[list[Window]]:
    start = 0
    while start < len(found):
        rows = max(1, min(_BATCH_ROWS, _BATCH_VALUES // (len(found[start].tokens) * vocabulary)))
        yield list(found[start : start + rows])
        start += rows
