"""Headers of safetensors files, which are untrusted: everything is checked before anything is allocated.

Format: 8 bytes with the length of a JSON object (little endian), the object, which spaces may follow, and the
data, which the object's offsets cover without holes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitquant_plugins.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# The limit of the safetensors library.
LONGEST = 100_000_000
# Offsets are padded to this, so that every tensor can be viewed in place.
ALIGNMENT = 8
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Placed:
    """A tensor of a file and where its data start, in bytes from the start of the file."""

    spec: TensorSpec
    start: int


def read_header(path: Path) -> dict[str, Placed]:
    """Return the tensors of a safetensors file; InputError where the header is not true to the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST, size - 8):
                raise InputError(f"{path} is truncated or no safetensors file: no room for a header of {length} bytes")
            raw = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    try:
        content = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged header: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} has a damaged header: it is not a JSON object")
    start = 8 + length
    found = {name: _placed(path, name, entry, start) for name, entry in content.items() if name != "__metadata__"}
    end = start
    for name, placed in sorted(found.items(), key=lambda item: (item[1].start, item[1].spec.bytes)):
        if placed.start != end:
            raise InputError(f"{path} has a damaged header: the data of {name} do not start where others end")
        end += placed.spec.bytes
    if end > size:
        raise InputError(f"{path} is truncated: {size} bytes of {end}; copy or download it again")
    if end < size:
        raise InputError(f"{path} has {size - end} bytes too many: its header does not fit its data")
    return found


def header_bytes(tensors: Mapping[str, tuple[TensorSpec, int]], length: int | None = None) -> bytes:
    """Return the header of tensors with data offsets, filled up with spaces to `length` bytes where given."""
    content: dict[str, Any] = {"__metadata__": METADATA}
    for name, (spec, offset) in tensors.items():
        content[name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    whole = 8 + len(text)
    whole += -whole % ALIGNMENT
    if length is not None:
        if whole > length:
            raise ValueError(f"the header takes {whole} bytes of {length}")
        whole = length
    return (whole - 8).to_bytes(8, "little") + text.ljust(whole - 8)


def longest_header(tensors: Iterable[tuple[str, TensorSpec]]) -> int:
    """Bytes within which the header of these tensors, or fewer of them, fits in whatever order they come."""
    listed = list(tensors)
    total = sum(spec.bytes for _, spec in listed)
    # Offsets never have more digits than the end of the data.
    return len(header_bytes({name: (spec, total) for name, spec in listed}))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _placed(path: Path, name: str, entry: Any, start: int) -> Placed:
    def damaged(problem: str) -> InputError:
        return InputError(f"{path} has a damaged header: tensor {name} {problem}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise damaged(f"has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise damaged(f"has shape {shape!r} and offsets {offsets!r}")
    numel = 1
    for length in shape:  # Python's numbers do not overflow
        numel *= length
    if offsets[1] - offsets[0] != numel * DTYPES[entry["dtype"]].itemsize:
        raise damaged(f"of {entry['dtype']} {shape} does not fit its {offsets[1] - offsets[0]} bytes")
    return Placed(TensorSpec(DTYPES[entry["dtype"]], tuple(shape)), start + offsets[0])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
