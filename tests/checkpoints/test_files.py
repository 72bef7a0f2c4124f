"""Files are written at once or not at all; what is read is checked."""

from __future__ import annotations

import stat

import pytest

from splitquant_plugins.checkpoints.files import read_json, write_atomically, write_json, write_text
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
