"""What is written replaces no link, device, pipe or input, and has the permissions that the user's umask leaves."""

from __future__ import annotations

import os
import socket
import stat

import pytest
import torch

from splitquant_plugins.checkpoints.files import refuse_output_file, refuse_output_folder, write_atomically, write_text
from splitquant_plugins.checkpoints.tensors import write_tensors
from splitquant_plugins.errors import InputError


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "socket"])
def test_s2_special_files_are_left_alone(tmp_path, kind, monkeypatch):
    path = tmp_path / "file"
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":  # no device of the machine: a test that fails would replace it
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("kept")
    before = path.lstat()
    for act in (lambda: write_text(path, "text"), lambda: refuse_output_file(path)):
        with pytest.raises(InputError, match="is not replaced"):
            act()
    assert stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(before.st_mode)
    assert kind != "link" or target.read_text() == "kept"


def test_s2_inputs_are_not_overwritten(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os.link(data, tmp_path / "same.csv")
    for path in (data, tmp_path / "same.csv", folder / "config.json"):
        with pytest.raises(InputError, match="is an input"):
            refuse_output_file(path, [data, folder])
    refuse_output_file(folder / "rows.json", [data, folder])


@pytest.mark.usefixtures("strict_umask")
def test_s3_new_files_follow_the_umask(tmp_path):
    write_text(tmp_path / "a", "text")
    write_tensors(tmp_path / "b", {"x": torch.zeros(2)})
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o600, 0o600]


def test_s3_a_replaced_file_keeps_its_permissions(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    write_atomically(tmp_path / "a", lambda temporary: temporary.write_text("new"))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert (tmp_path / "a").read_text() == "new"


def test_c4_folders_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "empty")
    here = type(tmp_path)()
    refuse_output_folder(tmp_path / "new" / "deep")
    for path, message in (
        (here, "no name"),
        (here / "..", "no name"),
        (here / ".." / "empty", "current folder"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "file", "not an empty folder"),
        (tmp_path, "not an empty folder"),
        (tmp_path / "file" / "below", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_output_folder(path)
