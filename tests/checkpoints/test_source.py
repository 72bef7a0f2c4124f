"""Checkpoints of many shards: read as the library reads them, and every contradiction named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitquant_plugins.checkpoints import source as module
from splitquant_plugins.checkpoints.source import INDEX_FILE, Source, is_sharded
from splitquant_plugins.errors import InputError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.arange(6).reshape(2, 3)}
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / ONE)
    save_file({"c": tensors["c"]}, tmp_path / TWO)
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO}, 60 + 14 + 48)
    return tmp_path


def write_index(folder, weight_map, total=None):
    metadata = {} if total is None else {"metadata": {"total_size": total}}
    (folder / INDEX_FILE).write_text(json.dumps({**metadata, "weight_map": weight_map}))


@pytest.mark.parametrize("block", [8, 1 << 24])
def test_tensors_are_read_whole_and_in_blocks(folder, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    source = Source(folder)
    expected = {**load_file(folder / ONE), **load_file(folder / TWO)}
    assert set(source.names) == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype
        assert source.read(name, torch.float64).dtype == torch.float64
        assert {piece.dtype for piece in source.blocks(name, torch.float64)} == {torch.float64}
        assert {piece.dtype for piece in source.blocks(name)} == {tensor.dtype}
        assert torch.equal(source.read(name, torch.float64), tensor.double())
        pieces = list(source.blocks(name, torch.float64))
        assert torch.equal(torch.cat(pieces), tensor.double().reshape(-1))
        assert all(piece.numel() * tensor.itemsize <= max(block, 8) for piece in pieces)
    assert source.same("a", "a")
    assert not source.same("a", "b")


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not is_sharded(tmp_path)
    assert torch.equal(Source(tmp_path).read("a"), torch.ones(2))


def test_a_folder_without_safetensors(tmp_path):
    with pytest.raises(InputError, match="only safetensors can be streamed"):
        Source(tmp_path)


LIES = {
    "tensor b is in model-00001-of-00002.safetensors, and in the index nowhere": ({"a": ONE, "c": TWO}, None),
    "tensor b is in model-00001-of-00002.safetensors, and in the index model-00002": (
        {"a": ONE, "b": TWO, "c": TWO},
        None,
    ),
    "has no tensor d": ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, None),
    "shard model-3.safetensors does not exist": ({"a": ONE, "b": ONE, "c": "model-3.safetensors"}, None),
    "no safetensors file beside it": ({"a": "../x.safetensors"}, None),
    "'model.bin', which is no safetensors file": ({"a": "model.bin"}, None),
    "total_size is 121, and the shards hold 122 bytes": ({"a": ONE, "b": ONE, "c": TWO}, 121),
    "has no weight_map": ([], None),
}


@pytest.mark.parametrize("message", LIES)
def test_an_index_that_lies(folder, message):
    write_index(folder, *LIES[message])
    with pytest.raises(InputError, match=message) as caught:
        Source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_damaged(folder, content):
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        Source(folder)


def test_a_missing_and_a_truncated_shard(folder):
    raw = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(raw[:-1])
    with pytest.raises(InputError, match=f"{TWO} is truncated"):
        Source(folder)
    (folder / TWO).unlink()
    with pytest.raises(InputError, match=f"{TWO} does not exist"):
        Source(folder)


def test_a_file_cut_short_while_it_is_read(folder):
    source = Source(folder)
    with (folder / TWO).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="was truncated while c was read"):
        source.read("c")


def test_names_come_in_the_order_of_the_files(tmp_path):
    tensors = {"z": torch.ones(2), "y": torch.ones(3), "none": torch.zeros(0), "also none": torch.zeros(0)}
    save_file({"z": tensors["z"], "none": tensors["none"]}, tmp_path / ONE)
    save_file({"y": tensors["y"], "also none": tensors["also none"]}, tmp_path / TWO)
    write_index(tmp_path, {"z": ONE, "none": ONE, "y": TWO, "also none": TWO}, 20)
    source = Source(tmp_path)
    assert source.files == [ONE, TWO]
    assert source.names == sorted(source.names, key=lambda n: (n in ("y", "also none"), source._placed[n][1].start, n))
    assert source.names[0] in ("none", "z")
    assert set(source.names[:2]) == {"none", "z"}
    assert "z" in source
    assert "x" not in source
    assert source.spec("y") == module.TensorSpec(torch.float32, (3,))
    assert source.read("none").shape == (0,)
    assert list(source.blocks("none")) == []


def test_tensors_are_the_same_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8)
    one = torch.arange(6.0)
    late = one.clone()
    late[5] = 9
    tensors = {
        **{"one": one, "same": one.clone(), "late": late, "shape": one.reshape(2, 3).clone()},
        **{"dtype": one.view(torch.int32).clone(), "zero": torch.zeros(6), "minus zero": -torch.zeros(6)},
        "nan": torch.full((6,), float("nan")),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = Source(tmp_path)
    equal = {(a, b) for a in tensors for b in tensors if source.same(a, b)}
    assert equal == {(a, a) for a in tensors} | {("one", "same"), ("same", "one")}


def test_the_total_that_an_index_states(folder):
    files = {"a": ONE, "b": ONE, "c": TWO}
    for total in (122, 122.0, None, "many", [121]):
        write_index(folder, files, total)
        Source(folder)
    for total in (0, 121, 123, 121.0):
        write_index(folder, files, total)
        with pytest.raises(InputError, match=rf"total_size is {int(total)}, and the shards hold 122 bytes"):
            Source(folder)
        Source(folder, check_total=False)
    for metadata in (None, [], 3, {}, {"total_size": None}):
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": files}))
        Source(folder)


def test_a_single_file_beside_an_index_is_not_read(folder):
    save_file({"z": torch.ones(2)}, folder / "model.safetensors")
    assert "z" not in Source(folder)
    assert is_sharded(str(folder))
    (folder / INDEX_FILE).unlink()
    assert Source(folder).names == ["z"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither model\.safetensors\.index\.json nor model\.safetensors: only"):
        Source(folder)


def test_what_changes_when_a_checkpoint_does(folder):
    source = Source(folder)
    status = [(folder / file).stat() for file in (ONE, TWO)]
    expected = [[file, each.st_size, each.st_mtime_ns] for file, each in zip((ONE, TWO), status, strict=True)]
    assert source.fingerprint() == expected


def test_what_a_disk_gives_in_pieces_is_put_together(folder, monkeypatch):
    expected = load_file(folder / ONE)["a"]
    opened = type(folder).open

    class InPieces:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *given):
            self.stream.close()

        def seek(self, place):
            self.stream.seek(place)

        def readinto(self, buffer):
            return self.stream.readinto(buffer[:7])

    source = Source(folder)
    monkeypatch.setattr(type(folder), "open", lambda self, *given, **options: InPieces(opened(self, *given, **options)))
    assert torch.equal(source.read("a"), expected)


@pytest.mark.parametrize("files", [{}, {"a": "folder/x.safetensors"}, {"a": 3}, {"a": "x.safetensors.txt"}, 3])
def test_an_index_of_strange_files(folder, files):
    (folder / "folder").mkdir()
    for name in ("folder/x.safetensors", "x.safetensors.txt"):
        (folder / name).write_bytes((folder / ONE).read_bytes())
    write_index(folder, files)
    with pytest.raises(InputError, match=r"has no weight_map|no safetensors file beside it"):
        Source(folder)


def test_the_first_tensor_that_is_missing_is_named(folder):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO, "z": TWO, "d": ONE})
    with pytest.raises(InputError, match=rf"index\.json: {ONE} has no tensor d$"):
        Source(folder)
