"""Texts from files of every kind, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.rows import read_texts

ROWS = [("one, two", "0"), ("three", "1")]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_csv_and_jsonl_hold_the_same(tmp_path: Path) -> None:
    table = write(tmp_path, "a.csv", 'text,label\n"one, two",0\nthree,1\n')
    lines = write(tmp_path, "a.jsonl", '{"text": "one, two", "label": "0"}\n\n{"label": "1", "text": "three"}\n')
    for source in (table, lines):
        assert list(read_texts(source, need_label=True)) == ROWS
        assert [text for text, _ in read_texts(source, need_label=False)] == ["one, two", "three"]


def test_a_line_of_plain_text_is_a_document(tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "one, two\n\n  \nthree")
    assert list(read_texts(source, need_label=False)) == [("one, two", ""), ("three", "")]
    with pytest.raises(InputError, match="has no labels"):
        list(read_texts(source, need_label=True))


def test_a_folder_gives_its_test_file(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "text\nno\n")
    with pytest.raises(InputError, match="no column label"):
        list(read_texts(str(tmp_path), need_label=True))
    write(tmp_path, "test.txt", "yes\n")
    assert list(read_texts(str(tmp_path), need_label=False)) == [("yes", "")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds none of test.csv"):
        list(read_texts(str(tmp_path / "empty"), need_label=False))


def test_a_saved_dataset_is_a_folder_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one, two", "three"], "label": ["0", "1"]})
    rows.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(tmp_path / "splits")
    for name in ("alone", "splits"):
        assert list(read_texts(str(tmp_path / name), need_label=True)) == ROWS
    rows.rename_column("text", "words").save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="has the columns words, label; it needs text"):
        list(read_texts(str(tmp_path / "other"), need_label=False))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"words": "two"}\n', "line 2: no field text"),
        ("a.jsonl", '{"text": 3}\n', "line 1: text is 3, and no text"),
        ("a.jsonl", "{text}\n", "line 1 is not JSON"),
        ("a.jsonl", '["text"]\n', "line 1: no field text"),
        ("a.csv", "words\none\n", "no column text; it needs text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        list(read_texts(write(tmp_path, name, content), need_label=False))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for source in (tmp_path / "absent.txt", "absent.jsonl", tmp_path / "absent"):
        with pytest.raises(InputError, match="no such data"):
            list(read_texts(str(source), need_label=False))
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\xfe\n")
    with pytest.raises(InputError, match="not text in UTF-8"):
        list(read_texts(str(tmp_path / "a.txt"), need_label=False))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device or a pipe"):
        list(read_texts(str(tmp_path / "pipe"), need_label=False))
