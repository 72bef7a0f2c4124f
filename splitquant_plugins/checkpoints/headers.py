"""Headers of safetensors files: where the data of each tensor lie, and how they are written before the data.

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
from safetensors import SafetensorError, safe_open

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
        with safe_open(path, "pt"):  # it checks the header, and the file's size against it
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is truncated, damaged or no safetensors file ({error}); copy or download it again"
        ) from None
    content.pop("__metadata__", None)
    for name, entry in content.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    return {
        name: Placed(TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0])
        for name, entry in content.items()
    }


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
