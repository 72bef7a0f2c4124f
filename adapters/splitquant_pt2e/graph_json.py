"""An exported graph as JSON, and back: node by node, with an allow list of operators, and no pickle.

torch.export.load is not used for untrusted files: a .pt2 archive can say that its tensors are pickles.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers PT2E's operators, in torchao's flow too
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from splitquant_plugins.errors import InputError

FORMAT = 1
NAMESPACES = ("aten", "quantized_decomposed", "prims")
REFUSED = ("from_file",)  # it would read any file of the machine
_OPERATORS = "add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem"
_SYMBOLIC = "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum sym_sqrt"
FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC.split() if hasattr(torch, name)},
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
TYPES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
GUARDS = "_guards_fn"  # checks of the input's shapes, which the stored graph does without


def graph_to_json(model: GraphModule) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the graph as JSON takes it, and the dotted names of the tensors it reads by those of their nodes.

    Raises InputError for a graph with submodules or operators that are not aten's or PT2E's own.
    """
    info = getattr(model.graph._codegen, "pytree_info", None)
    if info is None:
        raise InputError("the graph has no input and output structure; save what convert_pt2e returned")
    nodes, tensors = [], {}
    for node in model.graph.nodes:
        if node.op == "call_module" and node.target == GUARDS:
            continue
        entry: dict[str, Any] = {"op": node.op, "name": node.name, "args": _encode(node, list(node.args))}
        if node.kwargs:
            entry["kwargs"] = {key: _encode(node, value) for key, value in node.kwargs.items()}
        if node.op == "call_function":
            entry["target"] = _function_name(node)
        elif node.op in ("placeholder", "get_attr"):
            entry["target"] = str(node.target)
        elif node.op != "output":
            raise InputError(f"the graph calls {node.op} {node.target} ({node.name}), which cannot be saved as JSON")
        if node.op == "get_attr":
            tensors[node.name] = str(node.target)
        layer = node.meta.get("splitquant_layer")
        if layer is not None:
            entry["layer"] = layer
        nodes.append(entry)
    try:
        specs = [pytree.treespec_dumps(spec) for spec in (info.in_spec, info.out_spec)]
    except (NotImplementedError, TypeError) as error:
        raise InputError(f"the model's inputs or outputs are of a type that cannot be saved: {error}") from None
    described = {"format": FORMAT, "inputs": info.orig_args, "in_spec": specs[0], "out_spec": specs[1], "nodes": nodes}
    return described, tensors


def graph_from_json(described: Any, root: torch.nn.Module, where: object) -> GraphModule:
    """Rebuild the graph over `root`, which holds its tensors; InputError for what `graph_to_json` does not write."""
    try:
        if described["format"] != FORMAT:
            raise InputError(f"{where} has format {described['format']}; this version reads {FORMAT}")
        graph = Graph()
        nodes: dict[str, Node] = {}
        for entry in described["nodes"]:
            node = _node(graph, nodes, entry, where)
            nodes[entry["name"]] = node
        graph.set_codegen(
            _PyTreeCodeGen(
                _PyTreeInfo(
                    orig_args=[str(name) for name in described["inputs"]],
                    in_spec=_tree(described["in_spec"]),
                    out_spec=_tree(described["out_spec"]),
                )
            )
        )
        graph.lint()
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{where} is damaged: {type(error).__name__} {error}") from None
    return GraphModule(root, graph)


def _node(graph: Graph, nodes: dict[str, Node], entry: dict[str, Any], where: object) -> Node:
    op, name = entry["op"], entry["name"]
    if not str(name).isidentifier():
        raise InputError(f"{where} has a node called {name!r}")
    args = tuple(_decode(value, nodes) for value in entry["args"])
    kwargs = {str(key): _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    if op == "call_function":
        node = graph.create_node(op, _function(entry["target"], where), args, kwargs, name)
    elif op in ("placeholder", "get_attr"):
        target = str(entry["target"])
        if not all(part.isidentifier() or part.isdecimal() for part in target.split(".")):
            raise InputError(f"{where} reads {target!r}")
        node = graph.create_node(op, target, args, kwargs, name)
    elif op == "output":
        node = graph.create_node(op, "output", args, kwargs, name)
    else:
        raise InputError(f"{where} has a node of kind {op!r}")
    if "layer" in entry:
        node.meta["splitquant_layer"] = str(entry["layer"])
    return node


def _function_name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if target.namespace in NAMESPACES and target._opname not in REFUSED:
            return name
        raise InputError(
            f"the graph calls {name} ({node.name}), which is neither aten's nor PT2E's; it cannot be saved"
        )
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise InputError(f"the graph calls {target} ({node.name}), which cannot be saved")


def _function(name: str, where: object) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in NAMESPACES or parts[1] in REFUSED:
        raise InputError(f"{where} calls {name!r}, which is not allowed in a saved graph")
    found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise InputError(f"{where} calls {name!r}, which this version of torch does not have")
    return found


def _encode(node: Node, value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        items = [_encode(node, item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, slice):
        return {"slice": [_encode(node, part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise InputError(f"{node.name} has an argument of type {type(value).__name__}, which cannot be saved")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content)
    if not isinstance(found, TYPES[kind]):
        raise ValueError(f"torch.{content} is no {kind}")
    return found


def _tree(text: str) -> pytree.TreeSpec:
    """Read a structure; transformers' output classes are known once transformers is imported."""
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError:
        if "transformers.modeling_outputs" not in text:
            raise
        import transformers.modeling_outputs  # noqa: F401

        return pytree.treespec_loads(text)
