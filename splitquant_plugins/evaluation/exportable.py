"""Float models that programs are made from, with the batches that calibrate them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.checkpoints.transformers_models import (
    load_config,
    load_model,
    load_tokenizer,
    max_length_of,
)
from splitquant_plugins.errors import InputError, first_line
from splitquant_plugins.evaluation.python_functions import call_function, split_function
from splitquant_plugins.evaluation.texts import load_unlabelled

TEXTS = 64
LENGTH = 64
_MASKS = ("input_ids", "attention_mask", "token_type_ids")
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Exportable:
    """A float model, and batches that it takes by position; the sizes of the first one are the program's."""

    name: str
    model: nn.Module
    batches: list[Inputs]


def load_exportable(source: str, calibration: str | None = None, length: int | None = None) -> Exportable:
    """Load a transformers model, what FILE.py:NAME() returns, or an exported program FILE.pt2.

    - A transformers folder or Hub id needs `calibration`, a csv with a column text; its first texts, padded or cut to
      `length` tokens, go in one by one.
    - FILE.py:NAME runs that file, which has to be trusted, and calls the function NAME without arguments. It returns a
      model and a list of batches: tensors, or tuples of tensors that the model takes by position.
    - FILE.pt2 is what torch.export.save wrote, with the example inputs that it was exported with.

    Raises InputError, naming what is missing.
    """
    if split_function(source) is not None:
        _refuse_texts(source, calibration, length)
        return Exportable(source, *_called(source))
    if source.endswith(".pt2"):
        _refuse_texts(source, calibration, length)
        return Exportable(source, *_program(Path(source)))
    if calibration is None:
        raise InputError(f"{source} is calibrated with texts: give --calibration FILE, a csv with a column text")
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    tokens = min(length or LENGTH, max_length_of(config))
    texts = load_unlabelled(calibration, TEXTS)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    names = [name for name in _MASKS if name in encoded]
    batches = [tuple(encoded[name][row : row + 1] for name in names) for row in range(len(texts))]
    return Exportable(source, _ByPosition(load_model(source), names), batches)


class _ByPosition(nn.Module):
    """A transformers model that takes tensors by position and returns its logits alone."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", False):  # a cache of keys and values is no tensor that a program could return
            config.use_cache = False
        self.model = model
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits


def _refuse_texts(source: str, calibration: str | None, length: int | None) -> None:
    if calibration is not None or length is not None:
        raise InputError(f"{source} brings its own batches; leave --calibration and --length out")


def _called(source: str) -> tuple[nn.Module, list[Inputs]]:
    made = call_function(source)
    model, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    found = [batch if isinstance(batch, tuple) else (batch,) for batch in batches or ()]
    tensors = all(isinstance(one, Tensor) for batch in found for one in batch)
    if not isinstance(model, nn.Module) or not found or not tensors:
        raise InputError(f"{source}() has to return a torch.nn.Module and a list of batches, tensors or tuples of them")
    return model.eval(), found


def _program(path: Path) -> tuple[nn.Module, list[Inputs]]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    _refuse_pickles(path)
    try:
        exported = torch.export.load(path)
        model = exported.module()
    except Exception as error:  # whatever torch makes of a file that is not what it should be
        raise InputError(f"cannot load {path}: {first_line(error)}") from error
    args, kwargs = exported.example_inputs or ((), {})
    if kwargs or not args or not all(isinstance(one, Tensor) for one in args):
        raise InputError(f"{path} has no example inputs that are tensors by position; export it with them")
    return model, [tuple(args)]


def _refuse_pickles(path: Path) -> None:
    """Raise InputError for an archive that declares tensors to be pickles, which would be run when loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            tables = [name for name in archive.namelist() if name.endswith("_config.json")]
            known = any(name.endswith("archive_format") for name in archive.namelist())
            pickled = any('"use_pickle": true' in json.dumps(json.loads(archive.read(name))) for name in tables)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no archive of torch.export.save: {first_line(error)}") from None
    if not known or pickled:
        raise InputError(f"{path} holds pickles, which would be run when loaded; save it anew with torch.export.save")


def logits_of_batches(model: nn.Module, batches: Sequence[Inputs]) -> Tensor:
    """The first output of every batch, flattened to rows, float64."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            output = model(*batch)
            first = output if isinstance(output, Tensor) else _first_tensor(output)
            rows.append(first.detach().double().reshape(len(first) if first.ndim > 1 else 1, -1))
    return torch.cat(rows)


def _first_tensor(output: Any) -> Tensor:
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise InputError("the model returns no tensor")
