"""Tensors on disk: safetensors only, written at once or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitquant_plugins.checkpoints.files import write_atomically
from splitquant_plugins.checkpoints.source import SINGLE_FILE, Source, is_sharded
from splitquant_plugins.errors import InputError, SkeletonMismatchError


def untied_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and for the names that share another's memory the name that is kept."""
    kept: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
        if tensor.numel() and key in seen:
            same_as[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor.detach().contiguous().cpu()
    return kept, same_as


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors that overlap in memory are copied apart."""
    storages: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    write_atomically(path, lambda temporary: save_file(apart, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or damaged one is an InputError."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_state(folder: Path, same_as: Mapping[str, str]) -> dict[str, Tensor]:
    """Read the tensors of a folder, of one file or of shards, whose index and headers are checked first.

    `same_as` gives for names that are not stored the tensor that they share, as `untied_state` does.
    """
    if (folder / SINGLE_FILE).is_file() or not is_sharded(folder):
        state = read_tensors(folder / SINGLE_FILE)
    else:
        source = Source(folder)
        state = {name: source.read(name) for name in source.names}
    for name, kept in same_as.items():
        if name in state or kept in same_as or kept not in state:
            raise SkeletonMismatchError(f"{folder}: tensor {name} is to share {kept}, which is not there")
        state[name] = state[kept]
    return state


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that a state takes, tensors that share memory counted once."""
    kept, _ = untied_state(state)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
