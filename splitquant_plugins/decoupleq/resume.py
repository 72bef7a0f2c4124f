"""Finished stages on disk, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from splitquant_plugins.checkpoints.files import read_json, sha256_of, write_json
from splitquant_plugins.checkpoints.tensors import read_tensors, write_tensors
from splitquant_plugins.errors import InputError

# Attributes that torch gives every module, and others that say nothing of what it computes.
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), "config", "generation_config"})


def fingerprint(description: Mapping[str, Any], calls: Iterable[Any], tensors: Iterable[Tensor] = ()) -> str:
    """Return a hash of options, of the calibration's calls, and of the bytes of tensors."""
    paths = [each for call in calls for each in tree_flatten_with_path(call)[0]]
    leaves = [leaf for _, leaf in paths]
    plain = (bool, int, float, str, type(None))
    batches = [[keystr(path), leaf if isinstance(leaf, plain) else type(leaf).__name__] for path, leaf in paths]
    digest = hashlib.sha256(json.dumps({**description, "batches": batches}, sort_keys=True, default=repr).encode())
    for tensor in itertools.chain(tensors, (leaf for leaf in leaves if isinstance(leaf, Tensor))):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def described(model: nn.Module) -> dict[str, Any]:
    """What a model computes besides its tensors, as far as its modules say: classes, and attributes such as eps."""
    modules = {
        name: [
            type(module).__qualname__,
            {key: _said(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE},
        ]
        for name, module in model.named_modules()
    }
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else None
    code = [module.code for module in model.modules() if isinstance(module, torch.fx.GraphModule)]
    return {
        "modules": modules,
        "graphs": code,
        "config": said,
        "attention": getattr(config, "_attn_implementation", None),
    }


def _said(value: Any) -> Any:
    """An attribute, as far as it can be written: functions by their names, other objects by their classes."""
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, Tensor) and not value.is_meta:
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    if isinstance(value, (tuple, list)):
        return [_said(each) for each in value]
    if isinstance(value, dict):
        return {repr(key): _said(each) for key, each in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def refuse_file(folder: str | Path | None) -> None:
    """Raise InputError where no folder can be: something else has its name, or that of a folder above."""
    if folder is None:
        return
    path = Path(folder)
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise InputError(f"resume_dir={str(folder)!r}: {there} is not a folder; choose another")


class Finished:
    """The stages that a run with this fingerprint has finished; none are kept where `folder` is None."""

    def __init__(self, folder: str | Path | None, mark: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.mark = mark

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and records of a stage, or None; InputError where they are of another run."""
        if self.folder is None or not self._path(number, "json").is_file():
            return None
        content = read_json(self._path(number, "json"))
        if not isinstance(content, dict) or content.get("fingerprint") != self.mark:
            raise InputError(
                f"{self.folder} holds blocks that were solved with other options, weights or calibration data; choose "
                "another folder, or delete it"
            )
        path = self._path(number, "safetensors")
        tensors = read_tensors(path)
        if content.get("digest") != _digest(path, content.get("records")):
            raise InputError(f"{path} is not what was written there; delete the folder")
        return tensors, content["records"]

    def save(self, number: int, tensors: Mapping[str, Tensor], records: Mapping[str, Any]) -> None:
        """Keep a stage; the JSON file is written last, and makes it count."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number, "safetensors")
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()})
        content = {"fingerprint": self.mark, "digest": _digest(path, records), "records": dict(records)}
        write_json(self._path(number, "json"), content)

    def _path(self, number: int, extension: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{_name(number)}.{extension}"

    @staticmethod
    def tensors_file(number: int) -> str:
        """Name of the file that holds the tensors of a stage."""
        return f"{_name(number)}.safetensors"


def _digest(path: Path, records: Any) -> str:
    """A hash of a file of tensors and of the records that go with it."""
    return hashlib.sha256(f"{sha256_of(path)} {json.dumps(records, sort_keys=True)}".encode()).hexdigest()


def _name(number: int) -> str:
    return f"block_{number:04d}"
