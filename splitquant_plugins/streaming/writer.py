"""A safetensors file written tensor by tensor, whose number of tensors is known only at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import torch
from torch import Tensor

from splitquant_plugins.checkpoints.headers import ALIGNMENT, TensorSpec, header_bytes


class ShardWriter:
    """Writes to a temporary name; `finish` puts the header before the data, flushes the file and renames it.

    Room for a header of `header` bytes is left at the start. Tensors that would spoil the alignment of those
    behind them are kept back, and come last: the format allows no gaps. Left without `finish`, the temporary
    file is removed.
    """

    def __init__(self, path: Path, header: int) -> None:
        self.path = path
        self._header = header
        # Several may write the same file, on several machines; the last one to finish stays.
        self._temporary = path.with_name(f".{path.name}.{token_hex(4)}.partial")
        self._file = self._temporary.open("wb")
        self._file.seek(header)
        self._placed: dict[str, tuple[TensorSpec, int]] = {}
        self._end = 0
        self._last: dict[str, Tensor] = {}
        self._hash = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            with suppress(OSError):
                self._file.close()  # flushes, which fails again on a full disk
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> None:
        """Append a tensor that comes in consecutive blocks."""
        if spec.bytes % ALIGNMENT:
            self._last[name] = torch.cat([block.reshape(-1) for block in blocks]).reshape(spec.shape)
        else:
            self._append(name, spec, blocks)

    @property
    def digest(self) -> str:
        """SHA-256 of the finished file, as `digest_of` reads it."""
        return self._hash.hexdigest()

    def finish(self) -> int:
        """Write everything to the disk; return the size of the file."""
        for name, tensor in sorted(self._last.items(), key=lambda item: -item[1].dtype.itemsize):
            self._append(name, TensorSpec(tensor.dtype, tuple(tensor.shape)), [tensor])
        size = self._header + self._end
        self._file.seek(0)
        header = header_bytes(self._placed, self._header)
        self._file.write(header)
        self._hash.update(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return size

    def publish(self) -> None:
        """Rename the finished file into place."""
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _append(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> None:
        written = 0
        for block in blocks:
            raw = block.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.write(raw.data)
            self._hash.update(raw.data)
            written += raw.size
        if written != spec.bytes:
            raise ValueError(f"{name}: {written} bytes were written of {spec.bytes}")
        self._placed[name] = (spec, self._end)
        self._end += written


def digest_of(path: Path) -> str:
    """SHA-256 of a safetensors file, its data before its header, as they are written."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        length = 8 + int.from_bytes(file.read(8), "little")
        file.seek(length)
        while block := file.read(1 << 24):
            hashed.update(block)
        file.seek(0)
        hashed.update(file.read(min(length, path.stat().st_size)))
    return hashed.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
