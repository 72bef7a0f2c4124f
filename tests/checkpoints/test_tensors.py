"""Tensors on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from splitquant_plugins.checkpoints.files import write_json
from splitquant_plugins.checkpoints.tensors import read_state, read_tensors, state_bytes, untied_state, write_tensors
from splitquant_plugins.errors import InputError, SkeletonMismatchError

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_tied_tensors_are_kept_once():
    one = torch.randn(3, 4)
    state = {"a": one, "b": torch.randn(2), "c": one, "empty": torch.zeros(0), "none": torch.zeros(0)}
    kept, same_as = untied_state(state)
    assert set(kept) == {"a", "b", "empty", "none"}
    assert same_as == {"c": "a"}
    assert state_bytes(state) == (12 + 2) * 4


def test_views_of_one_memory_are_not_taken_for_the_same():
    one = torch.randn(4, 4)
    kept, same_as = untied_state(
        {"whole": one, "transposed": one.t(), "half": one[:2], "as integers": one.view(torch.int32)}
    )
    assert not same_as
    assert torch.equal(kept["transposed"], one.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8])
def test_tensors_come_back(tmp_path, dtype):
    base = torch.randint(0, 100, (6, 4)).to(dtype)
    state = {"base": base, "rows": base[:3], "again": base[3:], "scalar": torch.tensor(3).to(dtype)}
    write_tensors(tmp_path / "f.safetensors", state)
    back = read_tensors(tmp_path / "f.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == dtype


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"f\.safetensors does not exist"):
        read_tensors(tmp_path / "f.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "f.safetensors"
    write_tensors(path, {"a": torch.randn(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"f\.safetensors is damaged"):
        read_tensors(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})

    def fail(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("splitquant_plugins.checkpoints.tensors.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.ones(2)})
    assert torch.equal(read_tensors(path)["a"], torch.zeros(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_only_what_overlaps_is_copied(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(
        "splitquant_plugins.checkpoints.tensors.save_file", lambda state, path, metadata: written.update(state)
    )
    base, alone = torch.randn(6, 4), torch.randn(3)
    write_tensors(tmp_path / "f.safetensors", {"rows": base[:3], "alone": alone, "more": base[2:]})
    assert written["rows"].data_ptr() == base.data_ptr()
    assert written["alone"] is alone
    assert written["more"].data_ptr() != base[2:].data_ptr()


def test_the_file_says_that_it_is_of_torch(tmp_path):
    write_tensors(tmp_path / "f.safetensors", {"a": torch.zeros(2)})
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no file without it


def shards(folder):
    """Two files of a tensor each, and the index that names them."""
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    names = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(state, 1)}
    for name, file in names.items():
        write_tensors(folder / file, {name: state[name]})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 20}, "weight_map": names})
    return state


def test_a_state_is_read_from_one_file_or_from_shards(tmp_path):
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        read_state(tmp_path, {})
    state = shards(tmp_path)
    found = read_state(tmp_path, {"c": "b", "d": "b"})
    assert found.keys() == {"a", "b", "c", "d"}
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["c"] is found["b"]
    assert found["d"] is found["b"]
    write_tensors(tmp_path / "model.safetensors", {"a": torch.full((2,), 7.0)})  # which goes before the shards
    assert read_state(tmp_path, {}).keys() == {"a"}
    found = read_state(tmp_path, {"c": "a"})
    assert found["a"].tolist() == found["c"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("same_as", "name", "kept"),
    [({"a": "b"}, "a", "b"), ({"c": "d", "d": "a"}, "c", "d"), ({"c": "z"}, "c", "z"), ({"c": "c"}, "c", "c")],
    ids=["stored itself", "shares one that shares", "missing", "itself"],
)
def test_names_that_share_nothing_are_refused(tmp_path, same_as, name, kept):
    shards(tmp_path)
    with pytest.raises(SkeletonMismatchError, match=f"tensor {name} is to share {kept}, which is not there"):
        read_state(tmp_path, same_as)
