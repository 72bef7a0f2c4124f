"""Rows of texts with or without labels: csv, jsonl, plain text, a folder of one of these, a saved dataset, the Hub.

Whatever a file may be wrong in is an InputError that names file and line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from splitquant_plugins.errors import InputError, first_line, optional
from splitquant_plugins.evaluation.python_functions import split_function

LONGEST_FIELD = 2**31 - 1  # characters; the csv module's own limit, 131072, is shorter than some texts
SPLITS = ("test", "validation", "train")
SUFFIXES = (".csv", ".jsonl", ".txt")
# Columns of datasets that hold the texts, in the order in which they are looked for.
TEXT_COLUMNS = ("text", "sentence", "sms")


def read_texts(source: str, *, need_label: bool) -> Iterator[tuple[str, Any]]:
    """Yield (text, label) of every row, in order; the label is "" where there is none and none is needed.

    `source` is a .csv or .jsonl with the columns text and label, a .txt with one text in each line that is not blank,
    a folder with a test file of one of these kinds (or validation or train), a folder that the `datasets` library
    saved, or a Hub id.
    """
    refuse_function(source)
    path = Path(source)
    if path.is_dir():
        if is_saved_dataset(path):
            yield from _dataset_rows(load_dataset(source), source, need_label=need_label)
            return
        found = [path / f"{split}{suffix}" for split in SPLITS for suffix in SUFFIXES]
        there = next((each for each in found if each.is_file()), None)
        if there is None:
            names = ", ".join(f"{split}.csv" for split in SPLITS)
            raise InputError(f"{source} holds none of {names} (or .jsonl or .txt), and is no saved dataset")
        path = there
    if path.is_file():
        if path.suffix == ".jsonl":
            yield from _json_rows(path, need_label=need_label)
        elif path.suffix == ".txt":
            if need_label:
                raise InputError(f"{path} is plain text, and has no labels; give a csv with the columns text,label")
            yield from ((line, "") for line in _lines(path) if line.strip())
        else:
            yield from _csv_rows(path, need_label=need_label)
    elif path.exists():
        raise InputError(f"{source} is a device or a pipe; give a file")
    elif path.suffix in (*SUFFIXES, ".tsv", ".json") or path.is_absolute() or source.count("/") > 1:
        raise InputError(f"no such data: {source} is neither a file, nor a folder, nor a Hub id")
    else:
        yield from _dataset_rows(load_dataset(source), source, need_label=need_label)


def refuse_function(source: str) -> None:
    """Raise InputError for FILE.py:FUNCTION, whose data are for modules."""
    if split_function(source) is not None:
        raise InputError(f"{source}: functions give data for modules, FILE.py:FUNCTION, alone; give a file or a folder")


def is_saved_dataset(path: Path) -> bool:
    """Whether the `datasets` library saved this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_dataset(source: str) -> Any:
    """Load the split to measure on, of a folder that the `datasets` library saved, or of the Hub."""
    folder = Path(source).is_dir()
    what = "is a saved dataset, which needs" if folder else "is taken for a Hub id, which needs"
    datasets = optional("datasets", f"{source} {what} the package", "eval")
    try:
        splits = datasets.load_from_disk(source) if folder else datasets.load_dataset(source)
    except Exception as error:  # the library raises its own, the Hub's and the network's errors
        where = "" if folder else " from the Hub"
        raise InputError(f"cannot load data {source}{where}: {first_line(error)}") from None
    if not isinstance(splits, dict):
        return splits
    chosen = next((splits[name] for name in SPLITS if name in splits), None)
    if chosen is None:
        raise InputError(f"data {source} has none of the splits {', '.join(SPLITS)}")
    return chosen


def _dataset_rows(chosen: Any, source: str, *, need_label: bool) -> Iterator[tuple[str, Any]]:
    text = next((name for name in TEXT_COLUMNS if name in chosen.column_names), None)
    if text is None or (need_label and "label" not in chosen.column_names):
        needs = "text and label" if need_label else "text"
        raise InputError(f"data {source} has the columns {', '.join(chosen.column_names)}; it needs {needs}")
    for number, row in enumerate(chosen, start=1):
        if not isinstance(row[text], str):
            raise InputError(f"{source}, row {number}: {text} is {row[text]!r:.60}, and no text")
        yield row[text], row["label"] if need_label else ""


def _json_rows(path: Path, *, need_label: bool) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is not JSON: {first_line(error)}") from None
        missing = [name for name in ("text", *(["label"] if need_label else [])) if not _has(row, name)]
        if missing:
            raise InputError(f"{path}, line {number}: no field {' and '.join(missing)}")
        if not isinstance(row["text"], str):
            raise InputError(f"{path}, line {number}: text is {row['text']!r:.60}, and no text")
        yield row["text"], row["label"] if need_label else ""


def _has(row: Any, name: str) -> bool:
    return isinstance(row, dict) and name in row


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def _csv_rows(path: Path, *, need_label: bool) -> Iterable[tuple[str, str]]:
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
                needs = "text,label" if need_label else "text"
                raise InputError(f"{path} has no column {' and '.join(sorted(missing))}; it needs {needs}")
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
