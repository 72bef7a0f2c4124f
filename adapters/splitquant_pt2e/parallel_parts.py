"""One layer of a graph becomes k parallel ones and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from splitquant_plugins.modules import part_names
from splitquant_pt2e.annotation import Place, annotation_of, redirect, set_untouched
from splitquant_pt2e.compat import ANNOTATION
from splitquant_pt2e.layers import NAME, LayerCall

aten = torch.ops.aten
PART = "splitquant_part"  # in node.meta of a part: the number of the argument that is the layer's input
KEPT_META = ("val", "tensor_meta", "stack_trace", "from_node")


class PartStore:
    """Stores the parts of the tensors in the graph module, once each, and hands out nodes that read them."""

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._tensors = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
        self._nodes: dict[tuple[Node, int], Node] = {}

    def put(self, owner: str, k: int, leaf: str, parts: Sequence[Tensor | None]) -> list[str | None]:
        """Store the parts as `owner.lower.leaf` and so on; return their dotted names."""
        targets: list[str | None] = []
        if owner in self._tensors:
            owner = f"{owner}_split"
        for name, part in zip(part_names(k), parts, strict=True):
            path = f"{owner}.{name}"
            if part is None:
                targets.append(None)
                continue
            try:
                module = self._model.get_submodule(path)
            except AttributeError:
                self._model.add_submodule(path, nn.Module())
                module = self._model.get_submodule(path)
            module.register_parameter(leaf, nn.Parameter(part.detach().contiguous(), requires_grad=part.requires_grad))
            targets.append(f"{path}.{leaf}")
        return targets

    def read(self, original: Node, number: int, target: str | None) -> Node | None:
        """Return the node that reads part `number` of what `original` reads."""
        if target is None:
            return None
        if (original, number) not in self._nodes:
            with self._model.graph.inserting_after(original):
                node = self._model.graph.get_attr(target)
            node.meta = {key: value for key, value in original.meta.items() if key != ANNOTATION}
            self._nodes[original, number] = node
        return self._nodes[original, number]


@dataclass(frozen=True)
class SplitCall:
    """What took the place of one call of a layer: the nodes of its parts, and the sums of the first 2, 3, ... parts."""

    parts: list[Node]
    sums: list[Node]


class Moves:
    """Where the places of replaced layers went: their outputs, and the edges into them."""

    def __init__(self) -> None:
        self._outputs: dict[Node, Node] = {}
        self._edges: dict[tuple[Node, Node], tuple[Node, Node]] = {}

    def add(self, call: LayerCall, parts: Sequence[Node], weights: Sequence[Node], total: Node) -> None:
        """Note that `total` took the place of the layer's output, and the first part that of its edges."""
        self._outputs[call.node] = total
        first = parts[0]
        for argument in call.node.all_input_nodes:
            moved = weights[0] if argument is call.weight else argument
            if argument is call.bias:
                continue
            self._edges[argument, call.node] = (moved, first)

    def __call__(self, place: Place) -> Place:
        """Return the place that took this place."""
        if not isinstance(place, tuple):
            return self._outputs.get(place, place)
        argument, consumer = self._edges.get(place, place)
        return self._outputs.get(argument, argument), consumer


def replace_call(
    model: GraphModule, call: LayerCall, name: str, weights: Sequence[Node], biases: Sequence[Node | None], moves: Moves
) -> SplitCall:
    """Put k parallel layers and their sum in a layer's place.

    Each part takes over how the layer's input, weight and bias are to be quantized; the last sum takes over how
    its output is. The partial sums are not quantized. In a graph that is not annotated yet, all sums are marked as
    annotated, which keeps quantizers' fusion patterns off them.
    """
    graph, node = model.graph, call.node
    annotation = annotation_of(node)
    parts: list[Node] = []
    names = part_names(len(weights))
    with graph.inserting_before(node):
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            target, args = _arguments(call, weight, bias)
            part = graph.call_function(target, args, dict(node.kwargs))
            part.meta = _unique(node.meta, f"{node.name}_{names[number]}")
            part.meta["nn_module_stack"] = _module_stack(node, name, names[number])
            part.meta[NAME] = name
            part.meta[PART] = args.index(call.input)
            if annotation is not None:
                part.meta[ANNOTATION] = _part_annotation(annotation, call, part, weight, bias)
            parts.append(part)
        total, sums = parts[0], list[Node]()
        for part in parts[1:]:
            total = graph.call_function(aten.add.Tensor, (total, part))
            total.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
            total.meta["nn_module_stack"] = _module_stack(node, name, None)
            # Not operator.add, which quantizers look for behind a convolution.
            total.meta["source_fn_stack"] = [(total.name, aten.add.Tensor)]
            set_untouched(total, annotation)
            sums.append(total)
    if annotation is not None:
        total.meta[ANNOTATION] = replace(annotation, input_qspec_map={})
    moves.add(call, parts, weights, total)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return SplitCall(parts, sums)


def _arguments(call: LayerCall, weight: Node, bias: Node | None) -> tuple[Any, tuple]:
    args = call.node.args
    if call.kind == "conv1d_hf":
        return (aten.mm.default, (args[1], weight)) if bias is None else (aten.addmm.default, (bias, args[1], weight))
    return call.node.target, (args[0], weight, bias, *args[3:])


def _unique(meta: dict[str, Any], name: str) -> dict[str, Any]:
    """Copy the meta of a layer for a part, which quantizers' pattern matchers must not take for the same call."""
    copied = {key: value for key, value in meta.items() if key != ANNOTATION}
    if copied.get("source_fn_stack"):
        copied["source_fn_stack"] = [(name, copied["source_fn_stack"][-1][1])]
    if "torch_fn" in copied:
        copied["torch_fn"] = (name, copied["torch_fn"][1])
    return copied


def _module_stack(node: Node, name: str, part: str | None) -> dict[str, Any]:
    """Return the stack that a call from a split module would have; quantizers find layers by it too."""
    stack = dict(node.meta.get("nn_module_stack", {}))
    if stack:
        key, (owner, kind) = list(stack.items())[-1]
        kind_name = kind if isinstance(kind, str) else kind.__name__
        if owner == name:
            stack[key] = (owner, f"splitquant_plugins.modules.Split{kind_name.rpartition('.')[2]}")
            if part is not None:
                stack[f"{key}.{part}"] = (f"{owner}.{part}", kind)
    return stack


def _part_annotation(annotation: Any, call: LayerCall, part: Node, weight: Node, bias: Node | None) -> Any:
    own = {call.weight: weight} | ({call.bias: bias} if call.bias is not None else {})

    def move(place: Place) -> Place:
        if isinstance(place, tuple) and place[1] is call.node:
            return own.get(place[0], place[0]), part
        return place

    inputs = {}
    for argument, spec in (annotation.input_qspec_map or {}).items():
        moved = own.get(argument, argument)
        if moved is not None:
            inputs[moved] = redirect(spec, move)
    return replace(annotation, input_qspec_map=inputs, output_qspec=None)
