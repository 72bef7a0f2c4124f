"""Labelled texts, and texts alone; what comes in is checked before a model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.rows import read_texts


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the labels of their classes, 0 to classes - 1."""

    name: str
    texts: list[str]
    labels: list[int]


def load_texts(source: str, label_ids: Mapping[str, int], limit: int | None = None) -> LabelledTexts:
    """Load texts with labels that a model knows.

    `source` is what `rows.read_texts` takes, with labels. `label_ids` maps the model's label names to their numbers;
    a file may hold either. Raises InputError, naming file and row.
    """
    texts: list[str] = []
    labels: list[int] = []
    for number, (text, label) in enumerate(islice(read_texts(source, need_label=True), limit), start=1):
        texts.append(text)
        labels.append(label_number(label, label_ids, f"{source}, row {number}"))
    if not texts:
        raise InputError(f"{source} has no rows")
    return LabelledTexts(source, texts, labels)


def load_unlabelled(source: str, limit: int | None) -> list[str]:
    """Load the first texts of what `rows.read_texts` takes; labels are not read."""
    texts = [text for text, _ in islice(read_texts(source, need_label=False), limit)]
    if not texts:
        raise InputError(f"{source} has no rows")
    return texts


def label_number(value: Any, label_ids: Mapping[str, int], where: str) -> int:
    """Return the number of a label that is given by number or by the model's name for it."""
    if isinstance(value, str) and value in label_ids:
        return label_ids[value]
    try:
        # int() would cut 1.7 down to 1.
        label = -1 if isinstance(value, float) and not value.is_integer() else int(value)
    except (TypeError, ValueError):
        label = -1
    if label not in label_ids.values():
        highest = max(label_ids.values(), default=-1)
        raise InputError(f"{where}: label {value!r} is not one of the model's 0 to {highest}")
    return label
