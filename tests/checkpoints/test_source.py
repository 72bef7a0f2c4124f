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
