"""Files are written at once or not at all; what is read is checked."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys

import pytest
from pydantic import BaseModel

from splitquant_plugins.checkpoints.files import (
    described,
    read_described,
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
    path = tmp_path / "a" / "b" / "c.json"
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


def test_json_is_written_in_lines(tmp_path):
    write_json(tmp_path / "f", {"a": [1], "b": "é"})
    assert (tmp_path / "f").read_bytes() == b'{\n "a": [\n  1\n ],\n "b": "\\u00e9"\n}\n'


def test_text_is_utf_8_whatever_the_locale(tmp_path, python_path):
    """An interpreter that warns of every default encoding, and makes an error of it."""
    program = (
        "import sys; from pathlib import Path; from splitquant_plugins.checkpoints.files import read_json, write_json, "
        "write_text; path = Path(sys.argv[1]); write_json(path, ['é']); assert read_json(path) == ['é']; "
        "write_text(path, 'é')"
    )
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    subprocess.run(
        [sys.executable, *strict, "-c", program, str(tmp_path / "f")], check=True, env=python_path(), cwd=tmp_path
    )
    assert (tmp_path / "f").read_bytes() == "é".encode()


def test_a_temporary_name_that_is_taken_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda *_: "0" * 8)
    (tmp_path / "elsewhere").write_text("kept")
    taken = tmp_path / ".file.00000000"
    taken.symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"File exists.*file'$"):
        write_text(tmp_path / "file", "text")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    taken.unlink()


def test_what_a_failed_write_has_removed_itself_is_not_missed(tmp_path):
    def write(temporary):
        temporary.unlink()
        raise ValueError("no more room")

    with pytest.raises(ValueError, match="no more room"):
        write_atomically(tmp_path / "file", write)


class Described(BaseModel):
    rows: list[int]
    name: str = ""


def test_what_json_describes_is_checked(tmp_path):
    assert described({"rows": [1, 2]}, "here", Described) == Described(rows=[1, 2])
    with pytest.raises(InputError, match=r"^here is damaged or of another version: rows\.1 Input should be"):
        described({"rows": [1, "x", "y"], "name": 3}, "here", Described)
    path = tmp_path / "f.json"
    write_json(path, {"rows": [3], "name": "n"})
    assert read_described(path, Described) == Described(rows=[3], name="n")
    write_json(path, {"name": "n"})
    with pytest.raises(InputError, match=r"f\.json is damaged or of another version: rows Field required$"):
        read_described(path, Described)
