"""An exported graph as JSON, and back: node by node, with an allow list of operators.

No text of a file reaches a pickle, an importer or a compiler. torch.export.load is not used for untrusted files:
a .pt2 archive can say that its tensors are pickles.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers PT2E's operators, in torchao's flow too
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeInfo
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from splitquant_plugins.errors import InputError
from splitquant_pt2e.earlier_format import EARLIER, from_earlier
from splitquant_pt2e.guards import NAME as GUARDS
from splitquant_pt2e.guards import Guards, check_conditions, guards_of, is_guard, leaf_names
from splitquant_pt2e.loaded_graph import LoadedGraph, NamelessInputs
from splitquant_pt2e.tree_json import tree_from_json, tree_to_json

FORMAT = 2
TOP_FIELDS = ("format", "inputs", "in_spec", "out_spec", "guards", "nodes", "same_as", "has_manifest")
NODE_FIELDS = {
    "placeholder": ("op", "name", "args"),
    "get_attr": ("op", "name", "args", "target"),
    "call_function": ("op", "name", "args", "target", "kwargs", "layer"),
    "output": ("op", "name", "args"),
}
NAMESPACES = ("aten", "quantized_decomposed", "prims")
REFUSED = ("from_file", "seed", "manual_seed")  # they read any file of the machine, or change its random numbers
_OPERATORS = "add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem"
_SYMBOLIC = "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum sym_sqrt"
FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC.split() if hasattr(torch, name)},
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
TYPES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
SCHEMA_TYPES: dict[str, tuple[type, ...]] = {
    "TensorType": (int, float),  # a number is taken for a tensor of one value
    "IntType": (int, torch.dtype, torch.layout, torch.memory_format),
    "SymIntType": (int,),
    "FloatType": (float, int),
    "NumberType": (float, int),
    "BoolType": (bool,),
    "StringType": (str,),
    "DeviceObjType": (torch.device,),
    "ScalarTypeType": (torch.dtype,),
    "LayoutType": (torch.layout,),
    "MemoryFormatType": (torch.memory_format,),
}
DEEPEST = 8  # lists within lists, as arguments
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_.,:+\- >]{0,64}")  # such as "floor", "tanh", "ij->ji"


def graph_to_json(model: GraphModule) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the graph as JSON takes it, and the dotted names of the tensors it reads by those of their nodes.

    Raises InputError for a graph with submodules, with operators that are not aten's or PT2E's own, or with
    guards, inputs or outputs that JSON cannot say.
    """
    info = getattr(model.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None or info.out_spec is None:
        raise InputError("the graph has no input and output structure; save what convert_pt2e returned")
    nodes, tensors = [], {}
    for node in model.graph.nodes:
        if is_guard(node):
            continue
        entry: dict[str, Any] = {"op": node.op, "name": node.name, "args": _encode(node, list(node.args))}
        if node.kwargs:
            entry["kwargs"] = {key: _encode(node, value) for key, value in node.kwargs.items()}
        if node.op == "call_function":
            entry["target"] = _function_name(node)
            if changed := _inputs_written(node):
                raise InputError(f"the graph writes into its input {changed[0].name} ({node.name}), which is not saved")
        elif node.op == "get_attr":
            entry["target"] = tensors[node.name] = str(node.target)
        elif node.op not in ("placeholder", "output"):
            raise InputError(f"the graph calls {node.op} {node.target} ({node.name}), which cannot be saved as JSON")
        layer = node.meta.get("splitquant_layer")
        if layer is not None and node.op == "call_function":
            entry["layer"] = layer
        nodes.append(entry)
    described = {
        "format": FORMAT,
        "inputs": info.orig_args,
        "in_spec": tree_to_json(info.in_spec),
        "out_spec": tree_to_json(info.out_spec),
        "guards": guards_of(model, info.orig_args, info.in_spec),
        "nodes": nodes,
    }
    return described, tensors


def graph_from_json(described: Any, state: Mapping[str, Tensor], where: object) -> LoadedGraph:
    """Rebuild the graph over its tensors; InputError for what `graph_to_json` does not write.

    Nodes and tensors get names of this package's own making, so that no text of the file is compiled.
    """
    try:
        return _rebuild(described, state, where)
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{where} is damaged: {type(error).__name__} {' '.join(str(error).split())}") from None


def _rebuild(described: Any, state: Mapping[str, Tensor], where: object) -> LoadedGraph:
    if not isinstance(described, dict) or "nodes" not in described:
        raise InputError(f"{where} is damaged: it holds no graph")
    if described.get("format") == EARLIER:
        described = from_earlier(described, FORMAT)
    if described.get("format") != FORMAT:
        raise InputError(
            f"{where} has format {described.get('format')!r}; this version reads {FORMAT}: save the graph again"
        )
    _refuse_unknown(described, TOP_FIELDS, where)
    names, in_spec = _arguments(described)
    root = nn.Module()
    owned = {}
    for number, (name, tensor) in enumerate(state.items()):
        owned[name] = f"tensor_{number}"
        root.register_buffer(owned[name], tensor)
    graph, nodes = Graph(), dict[str, Node]()
    for number, entry in enumerate(described["nodes"]):
        if not isinstance(entry, dict):
            raise InputError(f"{where} is damaged: node {number} is no object")
        if not isinstance(entry.get("op"), str) or entry["op"] not in NODE_FIELDS:
            raise InputError(f"{where} has a node of kind {entry.get('op')!r}")
        _refuse_unknown(entry, NODE_FIELDS[entry["op"]], where)
        if not isinstance(entry["name"], str) or entry["name"] in nodes:
            raise InputError(f"{where} is damaged: node {number} has no name of its own")
        nodes[entry["name"]] = _node(graph, nodes, entry, f"node_{number}", owned, where)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    ordered = [node.op for node in graph.nodes]
    if len(inputs) != in_spec.num_leaves or ordered.count("output") != 1 or ordered[-1] != "output":
        raise InputError(f"{where} is damaged: its nodes are not {in_spec.num_leaves} inputs and, last, one output")
    conditions = check_conditions(described["guards"], len(inputs))
    if conditions:
        root.add_module(GUARDS, Guards(conditions, leaf_names(names, in_spec)))
        with graph.inserting_after(inputs[-1]):
            graph.call_module(GUARDS, tuple(inputs))
    for node in graph.nodes:
        if changed := _inputs_written(node):
            raise InputError(f"{where} is damaged: {node.target} writes into input {inputs.index(changed[0])}")
    graph.set_codegen(NamelessInputs(_PyTreeInfo(names, in_spec, tree_from_json(described["out_spec"]))))
    graph.lint()
    return LoadedGraph(root, graph)


def _refuse_unknown(entry: dict[str, Any], known: Collection[str], where: object) -> None:
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise InputError(f"{where} has a field {unknown[0]!r} that this version does not know")


def _arguments(described: dict[str, Any]) -> tuple[list[str], TreeSpec]:
    """Return the names of the arguments and how they nest."""
    names, in_spec = described["inputs"], tree_from_json(described["in_spec"])
    nest = pytree.tree_unflatten(range(in_spec.num_leaves), in_spec)
    is_call = isinstance(nest, tuple) and [type(each) for each in nest] == [tuple, dict]
    if not is_call or not all(isinstance(key, str) for key in nest[1]):
        raise ValueError("its inputs are no arguments and keywords")
    distinct = isinstance(names, list) and all(isinstance(name, str) for name in names) and len({*names, "self"})
    if distinct != len(nest[0]) + len(nest[1]) + 1 or distinct != len(names) + 1:
        raise ValueError("its inputs have not one name each")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"an input is called {name!r}")
    return names, in_spec


def _node(
    graph: Graph, nodes: dict[str, Node], entry: dict[str, Any], name: str, owned: Mapping[str, str], where: object
) -> Node:
    op = entry["op"]
    if not isinstance(entry["args"], list) or not isinstance(entry.get("kwargs", {}), dict):
        raise InputError(f"{where} is damaged: {name} has no list of arguments")
    args = tuple(_decode(value, nodes) for value in entry["args"])
    if op == "call_function":
        kwargs = {key: _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
        function = _function(entry["target"], where)
        _refuse_misfit_call(function, args, kwargs)
        node = graph.create_node(op, function, args, kwargs, name)
    elif op == "placeholder" and not args:
        node = graph.create_node(op, name, (), {}, name)
    elif op == "get_attr" and not args:
        node = graph.create_node(op, owned[entry["target"]], (), {}, name)
    elif op == "output" and len(args) == 1:
        node = graph.create_node(op, "output", args, {}, name)
    else:
        raise InputError(f"{where} has a node of kind {op!r} with {len(args)} arguments")
    if "layer" in entry:
        if not isinstance(entry["layer"], str):
            raise InputError(f"{where} is damaged: {name} belongs to no layer")
        node.meta["splitquant_layer"] = entry["layer"]
    return node


def _refuse_misfit_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where an operator is given arguments that it does not have, or lacks one that it needs."""
    if not isinstance(function, torch._ops.OpOverload):
        if kwargs:
            raise ValueError(f"{function.__name__} takes no keywords")
        return
    known = function._schema.arguments
    taken = {argument.name for argument in known[: len(args)]}
    free = {argument.name for argument in known} - taken
    needed = {argument.name for argument in known if not argument.has_default_value()} - taken
    if len(args) > len(known) or not needed <= set(kwargs) <= free:
        raise ValueError(f"{function} takes {', '.join(argument.name for argument in known)}")
    named = {argument.name: argument.real_type for argument in known}
    given = {**{argument.name: value for argument, value in zip(known, args, strict=False)}, **kwargs}
    for name, value in given.items():
        if not _fits(value, named[name]):
            raise ValueError(f"{function} takes a {named[name]} as {name}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether an argument may be of a type of torch's schemas; what a node will give is seen when it runs."""
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType())
    if name == "ListType":
        inner = kind.getElementType()
        return isinstance(value, Node) or (isinstance(value, (list, tuple)) and all(_fits(v, inner) for v in value))
    allowed = SCHEMA_TYPES.get(name)
    return allowed is None or isinstance(value, (Node, *allowed))


def _function_name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if target.namespace in NAMESPACES and _computes(target):
            return name
        raise InputError(
            f"the graph calls {name} ({node.name}), which is neither aten's nor PT2E's, or does something besides "
            "computing; it cannot be saved"
        )
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise InputError(f"the graph calls {target} ({node.name}), which cannot be saved")


def _function(name: Any, where: object) -> Any:
    if not isinstance(name, str):
        raise InputError(f"{where} is damaged: a node calls {type(name).__name__}")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in NAMESPACES:
        raise InputError(f"{where} calls {name!r}, which is not allowed in a saved graph")
    found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise InputError(f"{where} calls {name!r}, which this version of torch does not have")
    if not _computes(found):
        raise InputError(f"{where} calls {name!r}, which is not allowed in a saved graph")
    return found


def _computes(target: torch._ops.OpOverload) -> bool:
    """Whether an operator returns what it computes; one that returns nothing would change the process around it."""
    checks = target._opname.startswith(("_assert", "sym_constrain_range"))
    return target._opname not in REFUSED and (checks or bool(target._schema.returns))


def _inputs_written(node: Node) -> list[Node]:
    """Return the inputs of the graph that an operator writes into: tensors of whoever calls it."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    known = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(known, node.args, strict=False)} | node.kwargs
    written = [given.get(each.name) for each in known if each.alias_info is not None and each.alias_info.is_write]
    return [value for value in written if isinstance(value, Node) and value.op == "placeholder"]


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


def _decode(value: Any, nodes: dict[str, Node], depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ValueError("an argument nests too deeply")
    depth += 1
    if isinstance(value, list):
        return [_decode(item, nodes, depth) for item in value]
    if isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
        raise ValueError(f"an argument is {value[:40]!r}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError("an argument is beyond 64 bits")
    if type(value) is float and not math.isfinite(value):
        raise ValueError("an argument is not finite")
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        if not isinstance(content, str) or content not in nodes:
            raise ValueError(f"a node reads {content!r}, which does not come before it")
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes, depth) for item in _listed(content))
    if kind == "slice":
        start, stop, step = _listed(content)
        return slice(_decode(start, nodes, depth), _decode(stop, nodes, depth), _decode(step, nodes, depth))
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content) if kind in TYPES and _PLAIN_TEXT.fullmatch(content) else None
    if found is None or not isinstance(found, TYPES[kind]):
        raise ValueError(f"an argument is {kind} {content!r}")
    return found


def _listed(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("an argument is no list")
    return content
