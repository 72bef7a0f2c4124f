"""The layers of an exported graph: which nodes apply a weight, what the layers are called, and their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from splitquant_plugins.grid import Granularity
from splitquant_plugins.plan import LayerPlan

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
NAME = "splitquant_layer"  # in node.meta: the name of the layer that a node belongs to
_LEAF = re.compile(r"[._](weight|kernel)$")
_ATTENTION = "MultiheadAttention"


@dataclass(frozen=True)
class LayerCall:
    """One node that applies a layer. `axis` is the dimension of the weight that holds the output channels."""

    node: Node
    kind: str
    weight: Node
    bias: Node | None
    axis: int = 0
    reason: str | None = None

    @property
    def input(self) -> Any:
        """The node that the layer is applied to."""
        return self.node.args[1 if self.kind == "conv1d_hf" else 0]


def layer_calls(model: GraphModule) -> Iterator[LayerCall]:
    """Yield the calls of Linear and convolution layers in order, those that cannot be split with a reason."""
    for node in model.graph.nodes:
        call = _layer_call(node) if node.op == "call_function" else None
        if call is not None:
            yield call


def _layer_call(node: Node) -> LayerCall | None:
    args: tuple[Any, ...] = node.args
    if node.target == aten.addmm.default:
        # transformers' Conv1D: addmm(bias, input, weight) with the weight stored [in, out]
        bias, _, weight = args[:3]
        if not _is_stored(weight) or node.kwargs:
            return None
        return LayerCall(node, "conv1d_hf", weight, bias, axis=1, reason=_unfit(weight, bias))
    if node.target == aten.linear.default:
        kind = "linear"
    elif node.target in CONVOLUTIONS:
        kind = f"conv{CONVOLUTIONS[node.target]}d"
    elif node.target == aten.convolution.default:
        kind = f"conv{len(args[3])}d"
    elif node.target in TRANSPOSED:
        kind = "transposed convolution"
    else:
        return None
    weight = args[1]
    bias = args[2] if len(args) > 2 else None
    reason = _unfit(weight, bias)
    transposed = kind == "transposed convolution" or (node.target == aten.convolution.default and args[6])
    if transposed:
        reason = "transposed convolutions are not supported"
    if node.kwargs:
        reason = f"its call has keyword arguments ({', '.join(node.kwargs)})"
    return LayerCall(node, kind, weight, bias, axis=1 if transposed else 0, reason=reason)


def _is_stored(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


def _unfit(weight: Any, bias: Any) -> str | None:
    if not _is_stored(weight):
        return "its weight is computed in the graph"
    if bias is not None and not _is_stored(bias):
        return "its bias is computed in the graph"
    return None


def layer_name(call: LayerCall) -> str:
    """Return the dotted name of the layer in the model that was exported.

    It is the owner of the weight, unless the call comes from another module, to which the weight is tied.
    nn.MultiheadAttention's packed projection is called `in_proj`.
    """
    module, kind = innermost_module(call.node)
    if not _is_stored(call.weight):
        return module or call.node.name
    owner = _LEAF.sub("", str(call.weight.target))
    if owner == module or owner.startswith(f"{module}.") or not module or _ATTENTION in kind:
        return owner
    return module


def innermost_module(node: Node) -> tuple[str, str]:
    """Return the name and the class of the module that a node comes from, empty where the graph does not say."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack or stack[-1][0].startswith("_empty_nn_module_stack"):
        return "", ""
    name, kind = stack[-1]
    return re.sub(r"^L\['self'\]\.?", "", name), kind if isinstance(kind, str) else kind.__name__


def tensor_of(model: GraphModule, node: Node) -> Tensor:
    """Return the tensor that a get_attr node reads."""
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def layer_plan(model: GraphModule, call: LayerCall, granularity: str) -> LayerPlan:
    """Return the plan of a layer; a weight stored [in, out] is seen transposed."""
    weight = tensor_of(model, call.weight)
    bias = None if call.bias is None else tensor_of(model, call.bias)
    automatic: Granularity = "channel" if call.kind.startswith("conv") and call.kind != "conv1d_hf" else "tensor"
    chosen: Any = automatic if granularity == "auto" else granularity
    groups: Any = 1
    if call.node.target in CONVOLUTIONS and len(call.node.args) > 6:
        groups = call.node.args[6]
    elif call.node.target == aten.convolution.default:
        groups = call.node.args[8]
    return LayerPlan(call.kind, weight.t() if call.axis else weight, bias, chosen, groups)


def stamp_names(model: GraphModule) -> None:
    """Write each layer's name into the meta of its calls, where it outlives prepare_pt2e and convert_pt2e."""
    for call in layer_calls(model):
        call.node.meta.setdefault(NAME, layer_name(call))
