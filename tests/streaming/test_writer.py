"""A shard is written tensor by tensor, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.streaming.writer import ShardWriter, digest_of, sync_folder

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "whole": torch.arange(16.0).reshape(4, 4),
    "half": torch.arange(3, dtype=torch.float16),
    "single": torch.arange(3, dtype=torch.float32),
    "wide": torch.arange(3, dtype=torch.float64),
    "more": torch.arange(128, dtype=torch.int8).reshape(2, 64),
}


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def test_what_is_written_comes_back_aligned_with_size_and_digest(tmp_path):
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, 1024) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, spec_of(tensor), iter([tensor[:1], tensor[1:].t().contiguous().t()]))
        assert [entry.name[:19] for entry in tmp_path.iterdir()] == [".model.safetensors."]
        assert [entry.name[27:] for entry in tmp_path.iterdir()] == [".partial"]
        size = writer.finish()
        assert not path.exists()
        writer.publish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert size == path.stat().st_size == 1024 + 64 + 24 + 128 + 12 + 6 + 3
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    content = path.read_bytes()
    assert writer.digest == digest_of(path) == hashlib.sha256(content[1024:] + content[:1024]).hexdigest()
    with safe_open(path, "pt") as file:  # in the order of the file: what is aligned first, then wide before narrow
        assert list(file.offset_keys()) == ["whole", "wide", "more", "single", "half", "bytes"]


def test_several_may_write_the_same_file_and_the_last_one_stays(tmp_path):
    path = tmp_path / "f"
    with ShardWriter(path, 256) as one, ShardWriter(path, 256) as two:
        for number, writer in enumerate((one, two)):
            tensor = torch.full((4,), float(number))
            writer.add("a", spec_of(tensor), [tensor])
        for writer in (two, one):
            writer.finish()
            writer.publish()
    assert load_file(path)["a"].tolist() == [0, 0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def breaks_off() -> None:
        with ShardWriter(tmp_path / "f", 256) as writer:
            writer.add("a", spec_of(TENSORS["whole"]), [TENSORS["whole"]])
            raise MemoryError

    with pytest.raises(MemoryError):
        breaks_off()
    assert not list(tmp_path.iterdir())

    class Full:
        """A file on a full disk, which cannot be flushed."""

        closed = False

        def close(self) -> None:
            raise OSError("No space left on device")

    with ShardWriter(tmp_path / "f", 256) as writer:
        writer._file.close()
        writer._file = Full()
    assert not list(tmp_path.iterdir())
    with ShardWriter(tmp_path / "f", 256) as writer:
        writer._temporary.unlink()  # another process cleared it away
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [[TENSORS["whole"][:3]], [TENSORS["whole"]] * 2, []])
def test_blocks_that_are_not_the_tensor_are_an_error(tmp_path, blocks):
    with (
        ShardWriter(tmp_path / "f", 256) as writer,
        pytest.raises(ValueError, match=r"a: \d+ bytes were written"),
    ):
        writer.add("a", spec_of(TENSORS["whole"]), blocks)


def test_gradients_are_no_hindrance(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4))
    with ShardWriter(tmp_path / "f", 256) as writer:
        writer.add("a", spec_of(weight), [weight])
        writer.finish()
        writer.publish()
    assert load_file(tmp_path / "f")["a"].tolist() == [1, 1, 1, 1]


def test_the_file_is_flushed_before_its_name_is_and_the_folder_after(tmp_path, monkeypatch):
    synced = []

    def fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else ""
        synced.append((name.rpartition("/")[2][:2], (tmp_path / "f").exists(), os.path.getsize(name)))

    monkeypatch.setattr(os, "fsync", fsync)
    with ShardWriter(tmp_path / "f", 256) as writer:
        writer.add("a", spec_of(TENSORS["whole"]), [TENSORS["whole"]])
        size = writer.finish()
        writer.publish()
    assert [entry[:2] for entry in synced] == [(".f", False), (tmp_path.name[:2], True)]
    assert synced[0][2] == size


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path, monkeypatch):
    closed = []
    sync_folder(tmp_path / "missing")  # as on Windows, where no folder can be opened
    close = os.close
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), close(handle)))

    def fsync(handle: int) -> None:
        raise OSError("disk failure")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="disk failure"):
        sync_folder(tmp_path)
    assert len(closed) == 1


def test_digests_of_short_and_strange_files(tmp_path):
    """Of a header that says more than there is, and of a file that ends within its first eight bytes."""
    path = tmp_path / "f"
    for content, expected in (
        (b"", b""),
        (b"\x02", b"\x02"),
        ((3).to_bytes(8, "little") + b"{ }", (3).to_bytes(8, "little") + b"{ }"),
        ((3).to_bytes(8, "little") + b"{ }data", b"data" + (3).to_bytes(8, "little") + b"{ }"),
        ((2**40).to_bytes(8, "little") + b"{ }", (2**40).to_bytes(8, "little") + b"{ }"),
    ):
        path.write_bytes(content)
        assert digest_of(path) == hashlib.sha256(expected).hexdigest()
