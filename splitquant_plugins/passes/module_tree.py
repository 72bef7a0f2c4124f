"""Finding and replacing modules in a model, shared ones in all their places."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def occurrences(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module once, with all the dotted names it is reached by, in order of registration."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name)
    return [(module, names[key]) for key, module in modules.items()]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of a dotted name; the root itself cannot be replaced."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def transformers_conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D, a Linear whose weight is stored [in, out]; None where transformers is not imported.

    The core imports no transformers: where nobody else did, there is no such layer.
    """
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, or of a class made from it."""
    kind = transformers_conv1d()
    return kind is not None and isinstance(module, kind)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Where the body raises, put every module, parameter and buffer back in its place.

    What the body replaced is undone, not what it wrote into a tensor. Attributes of the model itself and of its
    `config` are put back too.
    """
    found: list[Any] = []
    for module in model.modules():
        found += [module._modules, module._parameters, module._buffers]
    found += [getattr(owner, "__dict__", None) for owner in (model, getattr(model, "config", None))]
    tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
        (table, dict(table)) for table in found if isinstance(table, dict)
    ]
    try:
        yield
    except BaseException:
        for table, before in tables:
            table.clear()
            table.update(before)
        raise
