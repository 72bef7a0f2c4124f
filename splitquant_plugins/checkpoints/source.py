"""A safetensors checkpoint to read from, of one file or of many with an index, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitquant_plugins.checkpoints.files import read_json
from splitquant_plugins.checkpoints.headers import Placed, TensorSpec, read_header
from splitquant_plugins.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BLOCK_BYTES = 1 << 24


def is_sharded(folder: str | Path) -> bool:
    """Whether a folder holds an index of safetensors shards."""
    return (Path(folder) / INDEX_FILE).is_file()


class Source:
    """The tensors of a checkpoint, by name. Files are read, not mapped: a file cut short is an error, no crash.

    Raises InputError where the index and the shards contradict each other or themselves; `check_total`: also in
    the size that the index states.
    """

    def __init__(self, folder: Path, *, check_total: bool = True) -> None:
        self.folder = folder
        weight_map, total = _read_index(folder)
        self.files: list[str] = sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]
        self._placed: dict[str, tuple[str, Placed]] = {}
        for file in self.files:
            for name, placed in read_header(folder / file).items():
                if weight_map and weight_map.get(name) != file:
                    said = weight_map.get(name, "nowhere")
                    raise InputError(f"{folder / INDEX_FILE}: tensor {name} is in {file}, and in the index {said}")
                self._placed[name] = (file, placed)
        missing = sorted(weight_map.keys() - self._placed.keys())
        if missing:
            raise InputError(f"{folder / INDEX_FILE}: {weight_map[missing[0]]} has no tensor {missing[0]}")
        held = sum(placed.spec.bytes for _, placed in self._placed.values())
        if check_total and total is not None and total != held:
            raise InputError(f"{folder / INDEX_FILE}: total_size is {total}, and the shards hold {held} bytes")

    def __contains__(self, name: str) -> bool:
        return name in self._placed

    @property
    def names(self) -> Sequence[str]:
        """The tensors in the order in which they are stored."""
        order = {file: number for number, file in enumerate(self.files)}
        return sorted(self._placed, key=lambda n: (order[self._placed[n][0]], self._placed[n][1].start, n))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor as it is stored."""
        return self._placed[name][1].spec

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, cast to `dtype` where given."""
        spec = self.spec(name)
        tensor = torch.empty(spec.shape, dtype=dtype or spec.dtype)
        flat, done = tensor.view(-1), 0
        if tensor.dtype == spec.dtype:
            self._fill(name, flat, 0)
            return tensor
        for block in self.blocks(name):
            flat[done : done + block.numel()] = block
            done += block.numel()
        return tensor

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Read one tensor as consecutive 1-D pieces, cast to `dtype` where given."""
        spec = self.spec(name)
        numel, step = torch.Size(spec.shape).numel(), BLOCK_BYTES // spec.dtype.itemsize
        for start in range(0, numel, step):
            block = torch.empty(min(step, numel - start), dtype=spec.dtype)
            self._fill(name, block, start * spec.dtype.itemsize)
            yield block.to(dtype or spec.dtype)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal bit for bit."""
        if self.spec(one) != self.spec(other):
            return False
        pairs = zip(self.blocks(one), self.blocks(other), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    def fingerprint(self) -> list[list[Any]]:
        """What changes when the checkpoint does: name, size and time of change of every file."""
        found = []
        for file in self.files:
            status = (self.folder / file).stat()
            found.append([file, status.st_size, status.st_mtime_ns])
        return found

    def _fill(self, name: str, flat: Tensor, offset: int) -> None:
        """Read into a 1-D tensor from `offset` bytes into the data of tensor `name`."""
        if not flat.numel():
            return
        file, placed = self._placed[name]
        left = flat.view(torch.uint8).numpy().data
        with (self.folder / file).open("rb", buffering=0) as stream:
            stream.seek(placed.start + offset)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise InputError(f"{self.folder / file} was truncated while {name} was read from it")
                left = left[count:]


def _read_index(folder: Path) -> tuple[dict[str, str], int | None]:
    """Return the file of each tensor, nothing where there is no index, and the total of bytes if it is stated."""
    path = folder / INDEX_FILE
    if not path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise InputError(f"{folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}: only safetensors can be streamed")
        return {}, None
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise InputError(f"{path}: tensor {name} is said to be in {file!r}, which is no safetensors file beside it")
        if not (folder / file).is_file():
            raise InputError(f"{path}: shard {file} does not exist; download it, or the index is of another checkpoint")
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, int(total) if isinstance(total, (int, float)) else None
