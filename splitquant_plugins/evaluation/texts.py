"""Labelled texts from a csv, a folder or the Hub; what comes in is checked before a model sees it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_plugins.errors import InputError, first_line, optional

LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit, 131072, is shorter than some texts
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the labels of their classes, 0 to classes - 1."""

    name: str
    texts: list[str]
    labels: list[int]


def load_texts(source: str, label_ids: Mapping[str, int], limit: int | None = None) -> LabelledTexts:
    """Load texts with labels that a model knows.

    `source` is a csv file with the columns text and label, a folder with a test.csv (or validation.csv or
    train.csv), or a Hub id. `label_ids` maps the model's label names to their numbers; a csv may hold either.
    Raises InputError, naming file and row.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}.csv" for split in SPLITS if (path / f"{split}.csv").is_file()]
        if not found:
            raise InputError(f"{source} holds none of {', '.join(f'{split}.csv' for split in SPLITS)}")
        path = found[0]
    if path.is_file():
        rows: Iterable[tuple[str, Any]] = _csv_rows(path)
    elif path.suffix in (".csv", ".tsv") or path.is_absolute() or source.count("/") > 1:
        raise InputError(f"no such data: {source} is neither a csv file, nor a folder, nor a Hub id")
    else:
        rows = _hub_rows(source)
    texts: list[str] = []
    labels: list[int] = []
    for number, (text, label) in enumerate(rows, start=1):
        if limit is not None and len(texts) >= limit:
            break
        texts.append(text)
        labels.append(_label(label, label_ids, f"{source}, row {number}"))
    if not texts:
        raise InputError(f"{source} has no rows")
    return LabelledTexts(source, texts, labels)


def load_unlabelled(source: str, limit: int) -> list[str]:
    """Load the first texts of a csv, for calibration; labels are not read."""
    path = Path(source)
    if not path.is_file():
        raise InputError(f"no such data: {source}")
    texts = [text for _, (text, _) in zip(range(limit), _csv_rows(path, need_label=False), strict=False)]
    if not texts:
        raise InputError(f"{source} has no rows")
    return texts


def _csv_rows(path: Path, *, need_label: bool = True) -> Iterable[tuple[str, str]]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
            if twice is not None:
                raise InputError(f"{path} has the column {twice!r} twice; name each column once")
            missing = {"text", *(["label"] if need_label else [])} - set(names)
            if missing:
                raise InputError(f"{path} has no column {' and '.join(sorted(missing))}; it needs text,label")
            for row in reader:
                if None in row:
                    many = len(reader.fieldnames or ()) + len(row[None])
                    raise InputError(
                        f"{path}, line {reader.line_num}: {many} fields, where the first line names "
                        f"{len(reader.fieldnames or ())}; put a text with commas in double quotes"
                    )
                if any(value is None for value in row.values()):
                    raise InputError(f"{path}, line {reader.line_num}: a field is missing")
                yield row["text"], row.get("label") or ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a csv in UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a csv: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _hub_rows(source: str) -> Iterable[tuple[str, Any]]:
    datasets = optional("datasets", f"{source} is taken for a Hub id, which needs the package", "eval")
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # the library raises its own, the Hub's and the network's errors
        raise InputError(f"cannot load data {source} from the Hub: {first_line(error)}") from None
    chosen = next((splits[name] for name in SPLITS if name in splits), None)
    if chosen is None:
        raise InputError(f"data {source} has none of the splits {', '.join(SPLITS)}")
    text = next((name for name in ("text", "sentence", "sms") if name in chosen.column_names), None)
    if text is None or "label" not in chosen.column_names:
        raise InputError(f"data {source} has the columns {', '.join(chosen.column_names)}; it needs text and label")
    return ((row[text], row["label"]) for row in chosen)


def _label(value: Any, label_ids: Mapping[str, int], where: str) -> int:
    if isinstance(value, str) and value in label_ids:
        return label_ids[value]
    try:
        label = int(value)
    except (TypeError, ValueError):
        label = -1
    if label not in label_ids.values():
        highest = max(label_ids.values(), default=-1)
        raise InputError(f"{where}: label {value!r} is not one of the model's 0 to {highest}")
    return label
