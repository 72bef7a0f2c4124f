"""A computed tensor that refuses to be written into, so that a write meant for a layer does not vanish."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from splitquant_plugins.errors import ReadOnlyError

_PYTHON_OPERATORS = "add sub mul matmul truediv div floordiv mod pow and or xor lshift rshift"
_WRITES = {
    *("__set__", "__setitem__", "setitem", *(f"__i{name}__" for name in _PYTHON_OPERATORS.split())),
    *(f"i{name}" for name in _PYTHON_OPERATORS.split()),
    *(name for home in (Tensor, torch, nn.init) for name in dir(home) if name.endswith("_") and name[-2:] != "__"),
}
_WHOLE_OBJECT = ("__deepcopy__", "__reduce_ex__")
# What may answer the same memory, for compilers, which know no memory to compare.
_VIEWS = {
    *("__getitem__", "getitem", "adjoint", "alias", "as_strided", "chunk", "contiguous", "cpu", "cuda", "detach"),
    *("diagonal", "dsplit", "expand", "expand_as", "flatten", "float", "half", "bfloat16", "double", "hsplit"),
    *("movedim", "moveaxis", "narrow", "permute", "positive", "ravel", "requires_grad_", "reshape", "reshape_as"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to"),
    *("to_dense", "transpose", "type", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
    *("vsplit", "_to_copy"),
}
_VIEWED_ATTRIBUTES = [getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real")]
_BASE = cast(Any, Tensor._base).__get__  # a view's, which compilers follow to its end


class ReadOnlyTensor(Tensor):
    """Behaves as the plain tensor that it was made of, but for writes in place, which raise ReadOnlyError.

    Whatever shares its memory (`.data`, `.detach()`, views, `.numpy()`) is read-only too; what is computed from
    it is plain. Gradients pass through.
    """

    source: str

    @staticmethod
    def of(tensor: Tensor, source: str) -> Tensor:
        """Return the tensor, read-only; `source` says in errors what was to be written into."""
        made: Any = tensor
        if torch.compiler.is_dynamo_compiling():
            made = tensor.view_as(tensor).as_subclass(ReadOnlyTensor)  # inputs of what it compiles are left alone
        elif type(tensor) is Tensor:
            made = tensor.as_subclass(ReadOnlyTensor)
        else:  # one of those that torch.export calls the model with: it has to stay what it is
            made.__class__ = _read_only_kind(type(tensor))
        made.source = source
        return cast(Tensor, made)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if not torch.compiler.is_dynamo_compiling():
            name = name.partition(".")[0]  # of torch.ops.aten.add_.Tensor
        if name in _WRITES or kwargs.get("inplace"):
            _refuse(name, args[:1] if args else list(kwargs.values())[:1])
        if "out" in kwargs:
            _refuse(name, [kwargs["out"]])
        if torch.compiler.is_dynamo_compiling():
            return _compiled(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if name in _WHOLE_OBJECT:
                args = [args[0].as_subclass(Tensor), *args[1:]]
            found = func(*args, **kwargs)
            if isinstance(found, np.ndarray):
                found.flags.writeable = False
            if not isinstance(found, (Tensor, tuple, list)) or isinstance(found, torch.Size) or func == _BASE:
                return found
            inputs = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, ReadOnlyTensor)]
            return pytree.tree_map_only(Tensor, lambda each: _shielded(each, inputs), found) if inputs else found


@functools.cache
def _read_only_kind(kind: type) -> type:
    return type(f"ReadOnly{kind.__name__}", (ReadOnlyTensor, kind), {})


def _compiled(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do what `__torch_function__` does in a way that torch.compile can follow."""
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*args, **kwargs)
        if func.__name__ not in _VIEWS and func not in _VIEWED_ATTRIBUTES:
            return found
        source = args[0].source if isinstance(args[0], ReadOnlyTensor) else "a computed tensor"
        if isinstance(found, (tuple, list)):
            return type(found)([ReadOnlyTensor.of(each, source) for each in found])
        return ReadOnlyTensor.of(found, source) if isinstance(found, Tensor) else found


def _refuse(name: str, written: Iterable[Any]) -> None:
    for given in written:
        for tensor in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(tensor, ReadOnlyTensor):
                raise ReadOnlyError(
                    f"{name} would write into {getattr(tensor, 'source', 'a computed tensor')}, and be lost: write "
                    "into a part, such as .lower.weight, into a copy (.clone()), or into the layer before the split"
                )


def _shielded(found: Tensor, inputs: Sequence[ReadOnlyTensor]) -> Tensor:
    """Return a result read-only where it lies in the memory of a read-only input."""
    if isinstance(found, ReadOnlyTensor):
        return found
    for each in inputs:
        if _memory(found) == _memory(each):
            return ReadOnlyTensor.of(found, getattr(each, "source", "a computed tensor"))
    return found


def _memory(tensor: Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors without memory, as functorch has
        return object()


def _compiled_with_its_caller_only(code: CodeType) -> None:
    """Keep torch.compile from compiling calls of a function by themselves.

    It does where a graph breaks, and looks only once at which function was overridden: others would then do the same.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if hasattr(frames, "skip_code"):  # before torch 2.7
        frames.skip_code(code)
    else:
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


_compiled_with_its_caller_only(cast(Any, ReadOnlyTensor.__torch_function__).__func__.__code__)
