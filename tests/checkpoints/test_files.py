"""Files are written at once or not at all; what is read is checked."""

from __future__ import annotations

import os
import stat

import pytest

from splitquant_plugins.checkpoints.files import (
    read_json,
    refuse_output_file,
    refuse_output_folder,
    write_atomically,
    write_json,
    write_text,
)
from splitquant_plugins.errors import InputError

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_folders_are_made_and_content_comes_back(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"word": "Größe", "list": [1, None]})
    assert read_json(path) == {"word": "Größe", "list": [1, None]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_write_that_breaks_off_changes_nothing(tmp_path, error, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert [entry.name for entry in tmp_path.iterdir()] == (["file"] if old else [])
    assert not old or path.read_text() == old


def test_a_rename_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.json is not JSON"):
        read_json(path)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(InputError, match=r"file\.json does not exist"):
        read_json(tmp_path / "file.json")


def test_a_name_that_is_said_twice_is_an_error(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(InputError, match=r"f\.json is not JSON: a name occurs twice"):
        read_json(path)
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert read_json(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("refuse", [refuse_output_file, refuse_output_folder])
def test_what_cannot_be_written_is_named_with_the_reason(tmp_path, refuse, monkeypatch):
    (tmp_path / "file").write_text("")
    wanted = tmp_path / "file" / "deeper" / "out"
    with pytest.raises(InputError, match=f"cannot write {wanted}: {tmp_path / 'file'} is not a folder"):
        refuse(wanted)
    wanted = tmp_path / "new" / "out"
    for missing in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda path, mode, missing=missing: not mode & missing)
        with pytest.raises(InputError, match=f"cannot write {wanted}: no permission to write into {tmp_path}$"):
            refuse(wanted)


def test_an_input_in_a_folder_with_a_broken_link_is_still_told_apart(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    (tmp_path / "out").write_text("")
    refuse_output_file(tmp_path / "out", [tmp_path / "in"])
    with pytest.raises(InputError, match="is an input"):
        refuse_output_file(tmp_path / "out", [tmp_path / "out"])
