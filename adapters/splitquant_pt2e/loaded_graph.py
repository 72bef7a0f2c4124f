"""A graph module whose generated code holds no text from a file.

torch.fx runs a graph by generating Python. Here every name in it is made up by this package, and the names of
the arguments, which callers may use as keywords, are looked up at the call.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree


class NamelessInputs(_PyTreeCodeGen):
    """Generates `forward(self, *args, **kwargs)`; names and nesting of the arguments are data."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """Return the head of the function, which asks the module for the flat inputs."""
        head = CodeGen.gen_fn_def(self, ["self", "*args", "**kwargs"], maybe_return_annotation)
        names = [name.split(":")[0].split("#")[0].strip() for name in free_vars]
        binding = f"{', '.join(names)}, = " if names else ""
        return f"{head}\n    {binding}self.flat_inputs(args, kwargs)"


class LoadedGraph(GraphModule):
    """A graph that was read from a file."""

    def flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the leaves of the arguments in order, given by position or by name.

        Raises TypeError for arguments that are missing, unknown or given twice, ValueError where they nest
        otherwise than those the model was exported with.
        """
        info = self._graph._codegen.pytree_info  # type: ignore[attr-defined]
        names = info.orig_args
        if len(args) > len(names):
            raise TypeError(f"the graph takes {len(names)} arguments, and was given {len(args)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in names:
                raise TypeError(f"the graph takes {', '.join(names)}; {name} is unknown, or was given twice")
            given[name] = value
        missing = [name for name in names if name not in given]
        if missing:
            raise TypeError(f"the graph lacks its argument {missing[0]}")
        values = [given[name] for name in names]
        positional, keywords = info.in_spec.children()
        first = positional.num_children
        nest = (tuple(values[:first]), dict(zip(keywords.context, values[first:], strict=True)))
        leaves, spec = pytree.tree_flatten(nest)
        if spec != info.in_spec:
            raise ValueError("the arguments nest otherwise than those that the graph was exported with")
        return leaves

    def recompile(self) -> Any:
        """Generate the code anew, and say what arguments it takes."""
        made = super().recompile()
        info = getattr(self._graph._codegen, "pytree_info", None)
        kinds = inspect.Parameter
        if info is not None:
            parameters = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", *info.orig_args)]
            type(self).forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return made
