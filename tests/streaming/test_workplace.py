"""A shard counts as done only where its file is the one that was written."""

from __future__ import annotations

import json
import os

import pytest
import torch

from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.errors import InputError
from splitquant_plugins.streaming.workplace import ShardRecord, Workplace
from splitquant_plugins.streaming.writer import ShardWriter, digest_of


@pytest.fixture
def place(tmp_path):
    """A half-done output with one finished shard."""
    made = Workplace(tmp_path / "out")
    with made.locked():
        made.begin({"what": "a test"})
        with ShardWriter(made.model / "one.safetensors", 256) as writer:
            for name, tensor in (("a", torch.arange(8.0)), ("odd", torch.ones(3, dtype=torch.uint8))):
                writer.add(name, TensorSpec(tensor.dtype, tuple(tensor.shape)), [tensor])
            record = ShardRecord(bytes=writer.finish(), digest=writer.digest, tensors={"a": 32, "odd": 3})
            made.write_record("one.safetensors", record)
            writer.publish()
        yield made


def test_the_digest_is_that_of_the_file(place):
    record = place.record_of("one.safetensors")
    assert record is not None
    assert digest_of(place.model / "one.safetensors") == record.digest


@pytest.mark.parametrize("where", [0, 20, 260, -1])
def test_a_shard_of_the_right_size_and_other_bytes_is_made_again(place, where):
    path = place.model / "one.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert place.record_of("one.safetensors") is None


def test_mutated_records_are_made_again_or_equal(place, mutations, count_cases):
    path = place.folder / "done" / "one.safetensors.json"
    found = place.record_of("one.safetensors")
    refused = 0
    mutants = list(mutations(path.read_text()))
    for text in mutants:
        path.write_text(text)
        record = place.record_of("one.safetensors")
        refused += record is None
        assert record is None or record.digest == found.digest
    count_cases("streaming's shard records mutated", len(mutants), f"{refused} refused")
    assert refused > len(mutants) / 4


def test_work_is_taken_up_again_with_the_same_plan_alone(tmp_path):
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    place.begin({"k": 3, "seed": 0})
    assert json.loads((tmp_path / "out.partial" / "plan.json").read_text()) == {"k": 3, "seed": 0}
    (tmp_path / "out.partial" / "model" / ".shard.partial").write_text("killed")
    (tmp_path / "out.partial" / "model" / "shard").write_text("finished")
    again = Workplace(tmp_path / "out")
    again.begin({"k": 3, "seed": 0})
    assert [path.name for path in again.model.iterdir()] == ["shard"]
    for other in ({"k": 2, "seed": 0}, {"k": 3}, {"k": 3, "seed": 0, "more": 1}):
        changed = next(key for key in ("k", "seed", "more") if other.get(key) != {"k": 3, "seed": 0}.get(key))
        with pytest.raises(InputError, match=f"half done, and was begun with another {changed}: run the command"):
            again.begin(other)
    (tmp_path / "out.partial" / "plan.json").write_text("[]")
    with pytest.raises(InputError, match="begun with another k"):
        again.begin({"k": 3, "seed": 0})


def test_a_record_whose_shard_is_gone_is_not_done(tmp_path):
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    place.begin({"k": 3})
    place.write_record("shard", ShardRecord(bytes=3, digest="x", tensors={}))
    assert place.record_of("shard") is None
    (place.model / "shard").write_bytes(b"abc")
    assert place.record_of("shard") is None
    done = ShardRecord(bytes=3, digest=digest_of(place.model / "shard"), tensors={})
    place.write_record("shard", done)
    assert place.record_of("shard") == done
    place.publish()
    assert (tmp_path / "out" / "shard").read_bytes() == b"abc"
    assert not place.folder.exists()


@pytest.mark.parametrize("name", ["", "model", "done", "lock"])
def test_links_are_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("theirs") if name == "lock" else victim.mkdir()
    place = Workplace(tmp_path / "out")
    link = place.folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(InputError, match="symbolic link, which is not followed"), place.locked():
        pass
    assert victim.read_text() == "theirs" if name == "lock" else not any(victim.iterdir())


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    (place.folder / "lock").mkdir()
    with pytest.raises(InputError, match="lock is no file"), place.locked():
        pass


def test_two_do_not_work_at_the_same_place_at_once(tmp_path):
    place = Workplace(tmp_path / "deep" / "out")
    with place.locked():
        assert place.folder.is_dir()
        other = Workplace(tmp_path / "deep" / "out")
        with pytest.raises(InputError, match=r"out\.partial is being worked on by another"), other.locked():
            pass
    with place.locked():  # and again after the other
        pass
    (tmp_path / "file").write_text("")
    other = Workplace(tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"cannot write .*out: Not a directory; choose another"), other.locked():
        pass


def test_others_join_the_same_plan_where_they_can_write(tmp_path, monkeypatch):
    place, plan = Workplace(tmp_path / "out"), {"k": 3, "seed": 0}
    with pytest.raises(InputError, match=r"plan\.json does not exist"):
        place.join(plan)
    place.folder.mkdir()
    place.begin(plan)
    Workplace(tmp_path / "out").join(plan)
    with pytest.raises(InputError, match=r"plan\.json has another seed there; give an --output"):
        place.join({"k": 3, "seed": 1})
    for folder in ("model", "done"):
        for missing in (os.W_OK, os.X_OK):

            def access(path, mode, folder=folder, missing=missing):
                return path.name != folder or not mode & missing

            monkeypatch.setattr(os, "access", access)
            with pytest.raises(InputError, match=f"{folder} cannot be written there; start the worker as the same"):
                place.join(plan)


def test_the_parts_of_a_budget_are_kept(tmp_path):
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    assert place.parts() is None
    place.write_parts({"a": 1, "b": 4})
    assert json.loads((tmp_path / "out.partial" / "parts.json").read_text()) == {"a": 1, "b": 4}
    assert Workplace(tmp_path / "out").parts() == {"a": 1, "b": 4}
    place.write_parts({})
    assert place.parts() == {}
    for damaged in ("[]", "[1]", '{"a": 1, "b": "2"}', '{"a": 1.5}', "null", "3"):
        (place.folder / "parts.json").write_text(damaged)
        with pytest.raises(InputError, match=r"parts\.json is damaged; delete .*out\.partial to begin anew"):
            place.parts()


def test_what_cannot_be_cleared_away_does_not_undo_what_is_published(tmp_path, monkeypatch):
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    place.begin({"k": 3})
    (place.model / "shard").write_bytes(b"abc")
    gone = place.model / ".gone.partial"  # which another process clears away first
    monkeypatch.setattr(type(place.model), "glob", lambda self, pattern: [gone] if pattern == ".*.partial" else [])

    def unlink(name, *args, **kwargs):
        raise PermissionError(name)

    monkeypatch.setattr(os, "rmdir", unlink)
    place.publish()
    assert (tmp_path / "out" / "shard").read_bytes() == b"abc"


def test_renames_are_flushed_before_the_work_is_cleared_away(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("splitquant_plugins.streaming.workplace.sync_folder", done.append)
    place = Workplace(tmp_path / "out")
    place.folder.mkdir()
    place.begin({"k": 3})
    place.publish()
    assert done == [tmp_path / "out.partial" / "model", tmp_path]
