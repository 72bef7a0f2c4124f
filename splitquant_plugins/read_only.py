"""A computed tensor that refuses to be written into, so that a write meant for a layer does not vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from splitquant_plugins.errors import ReadOnlyError

_PYTHON_OPERATORS = "add sub mul matmul truediv div floordiv mod pow and or xor lshift rshift"
_WRITES = {"__set__", "__setitem__", *(f"__i{name}__" for name in _PYTHON_OPERATORS.split())}
_WHOLE_OBJECT = ("__deepcopy__", "__reduce_ex__")


class ReadOnlyTensor(Tensor):
    """Behaves as the plain tensor that it was made of, but for writes in place, which raise ReadOnlyError.

    Whatever shares its memory (`.data`, `.detach()`, views, `.numpy()`) is read-only too; what is computed from
    it is plain. Gradients pass through.
    """

    source: str

    @staticmethod
    def of(tensor: Tensor, source: str) -> Tensor:
        """Return the tensor, read-only; `source` says in errors what was to be written into.

        Compilers and exporters see the plain tensor: they cannot follow a subclass.
        """
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return tensor
        made = tensor.as_subclass(ReadOnlyTensor)
        made.source = source
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        if in_place or "out" in kwargs:
            _refuse(name, [kwargs.get("out"), *((args[:1] or list(kwargs.values())[:1]) if in_place else ())])
        with torch._C.DisableTorchFunctionSubclass():
            if name in _WHOLE_OBJECT:
                args = [args[0].as_subclass(Tensor), *args[1:]]
            found = func(*args, **kwargs)
            if isinstance(found, np.ndarray):
                found.flags.writeable = False
            if not isinstance(found, (Tensor, tuple, list)) or isinstance(found, torch.Size):
                return found
            inputs = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, ReadOnlyTensor)]
            return pytree.tree_map_only(Tensor, lambda each: _shielded(each, inputs), found) if inputs else found


def _refuse(name: str, written: Sequence[Any]) -> None:
    for tensor in pytree.tree_leaves(written):
        if isinstance(tensor, ReadOnlyTensor):
            raise ReadOnlyError(
                f"{name} would write into {getattr(tensor, 'source', 'a computed tensor')}, and be lost: write into a "
                "part, such as .lower.weight, into a copy (.clone()), or into the layer before the split"
            )


def _shielded(found: Tensor, inputs: Sequence[ReadOnlyTensor]) -> Tensor:
    """Return a result read-only where it lies in the memory of a read-only input."""
    if isinstance(found, ReadOnlyTensor):
        return found
    for each in inputs:
        if _memory(found) == _memory(each):
            shielded = found.as_subclass(ReadOnlyTensor)
            shielded.source = getattr(each, "source", "a computed tensor")
            return shielded
    return found


def _memory(tensor: Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors without memory, as functorch has
        return object()
