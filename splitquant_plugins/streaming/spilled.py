"""Tensors that are kept while there is room for them, and the others in memory-mapped files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map


class Spill:
    """A place for tensors: in memory while they take at most `max_bytes` together, else in files of `folder`.

    The folder has to exist; whoever made it removes it. `bytes` is what is held in memory.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.bytes = 0
        self._files = 0

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor; it is not to be written into afterwards."""
        if self.bytes + tensor.nbytes <= self.max_bytes:
            self.bytes += tensor.nbytes
            return Kept(self, tensor)
        self._files += 1
        path = self.folder / f"{self._files}.safetensors"
        save_file({"values": tensor.detach().cpu().contiguous()}, path)
        return Kept(self, path, str(tensor.device))


@dataclass(frozen=True)
class Kept:
    """A tensor of a `Spill`, or the file that it is in."""

    spill: Spill
    place: Tensor | Path
    device: str = "cpu"

    def get(self) -> Tensor:
        """The tensor; one in a file is mapped into memory, and read where it is used."""
        if isinstance(self.place, Tensor):
            return self.place
        with safe_open(self.place, framework="pt") as file:
            found: Tensor = file.get_tensor("values")
        return found.to(self.device)

    def drop(self) -> None:
        """Let go of the tensor: it is not asked for again."""
        if isinstance(self.place, Path):
            self.place.unlink(missing_ok=True)
        else:
            self.spill.bytes -= self.place.nbytes


def loaded(value: Any) -> Any:
    """A nest of dicts, tuples and lists with its kept tensors."""
    return tree_map(lambda leaf: leaf.get() if isinstance(leaf, Kept) else leaf, value)
