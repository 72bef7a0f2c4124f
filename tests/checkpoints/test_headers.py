"""Safetensors headers: what the library writes is read, what is written the library reads, nothing else passes."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from splitquant_plugins.checkpoints.headers import DTYPES, TensorSpec, header_bytes, longest_header, read_header
from splitquant_plugins.errors import InputError
from splitquant_plugins.streaming.writer import ShardWriter

specs = st.builds(
    TensorSpec, st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple)
)
files = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), specs, max_size=6)


def filled(spec):
    raw = torch.randint(0, 2, (spec.bytes,), dtype=torch.uint8)
    return raw.view(spec.dtype).reshape(spec.shape)


def equal(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@given(files, st.integers(1, 3))
def test_what_is_written_the_library_reads(tmp_path_factory, described, pieces):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    tensors = {name: filled(spec) for name, spec in described.items()}
    # Room for more than is written, as a layer may turn out to have fewer parts.
    room = longest_header([*described.items(), ("another", TensorSpec(torch.float32, (10**6,)))])
    with ShardWriter(path, room) as writer:
        for name, tensor in tensors.items():
            writer.add(name, described[name], tensor.reshape(-1).tensor_split(pieces))
        assert not path.exists()
        size = writer.finish()
        writer.publish()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size == size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(equal(found[name], tensors[name]) for name in tensors)
    placed = read_header(path)
    assert {name: one.spec for name, one in placed.items()} == described
    assert all((one.start - room) % one.spec.dtype.itemsize == 0 for one in placed.values())


@given(files)
def test_what_the_library_writes_is_read(tmp_path_factory, described):
    path = tmp_path_factory.mktemp("library") / "x.safetensors"
    tensors = {name: filled(spec) for name, spec in described.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    raw = path.read_bytes()
    assert {name: one.spec for name, one in found.items()} == described
    for name, one in found.items():
        assert (
            raw[one.start : one.start + one.spec.bytes] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path):
    def write():
        with ShardWriter(tmp_path / "x.safetensors", 64) as writer:
            writer.add("a", TensorSpec(torch.float32, (4,)), [torch.ones(4)])
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_size_than_said_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a: 16 bytes were written of 32"), ShardWriter(tmp_path / "x", 64) as writer:
        writer.add("a", TensorSpec(torch.float32, (8,)), [torch.ones(4)])


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = [
    ({"a": entry()}, 7),
    ({"a": entry()}, 12),
    ({"a": entry("F8")}, 8),
    ({"a": entry(shape=(3,))}, 8),
    ({"a": entry(shape=(-2,))}, 8),
    ({"a": entry(shape=(2.0,))}, 8),
    ({"a": entry(shape=(True, 2))}, 8),
    ({"a": {**entry(), "shape": "x"}}, 8),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    ({"a": {"dtype": "F32"}}, 8),
    ({"a": 3}, 8),
    ([1], 0),
    ({"a": entry(shape=(2**40, 2**40), offsets=(0, 0))}, 0),
    ({"a": entry(shape=(10**12,), offsets=(0, 4 * 10**12))}, 8),
]


@pytest.mark.parametrize(("content", "size"), LIES)
def test_headers_that_lie_are_refused_with_the_file(tmp_path, content, size):
    text = json.dumps(content).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(InputError, match=re.escape(f"{path} is truncated, damaged or no safetensors file")):
        read_header(path)


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, path)
    with pytest.raises(InputError, match="tensor a has dtype 'C64'"):
        read_header(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08\x00",
        (2**63).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (30).to_bytes(8, "little") + b'{"a":1,"a":1}'.ljust(30),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(InputError, match="truncated, damaged or no safetensors file"):
        read_header(tmp_path / "x")


def test_a_header_byte_for_byte():
    described = {"é": (TensorSpec(torch.float32, (2, 1)), 16), "b": (TensorSpec(torch.int8, ()), 24)}
    text = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"F32","shape":[2,1],"data_offsets":[16,24]},'
        '"b":{"dtype":"I8","shape":[],"data_offsets":[24,25]}}'
    ).encode()
    whole = 8 + len(text) + -len(text) % 8
    assert whole > 8 + len(text)
    for length, expected in ((None, whole), (whole, whole), (whole + 8, whole + 8)):
        assert header_bytes(described, length) == (expected - 8).to_bytes(8, "little") + text.ljust(expected - 8)
    with pytest.raises(ValueError, match=f"the header takes {whole} bytes of {whole - 8}"):
        header_bytes(described, whole - 8)
    assert len(header_bytes({})) == 8 + 32  # of 31 characters
    assert longest_header([("b", TensorSpec(torch.int8, (5,)))]) == len(
        header_bytes({"b": (TensorSpec(torch.int8, (5,)), 5)})
    )
