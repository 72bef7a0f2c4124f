"""The weights that a converted graph stores."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from splitquant_plugins.backends import StoredWeight
from splitquant_pt2e.layers import NAME, tensor_of

DEQUANTIZE = ("dequantize_per_channel", "dequantize_per_tensor")


def stored_weights(model: GraphModule) -> dict[str, list[StoredWeight]]:
    """Return, by the name of the float layer, the quantized weights of a converted graph, one per part.

    Each has the shape of the layer's weight and counts the bits that the graph holds: a byte per code, and the
    scales and zero points in the types they have there. Weights that several calls share count once.
    """
    found: dict[str, dict[str, StoredWeight]] = {}
    for node in model.graph.nodes:
        name = node.meta.get(NAME)
        if name is None or node.op != "call_function":
            continue
        for argument in node.all_input_nodes:
            if _dequantizes_stored(argument) and not _is_bias(node, argument):
                codes = str(argument.args[0].target)
                found.setdefault(name, {}).setdefault(codes, _stored(model, argument))
    return {name: list(weights.values()) for name, weights in found.items()}


def _is_bias(node: Node, argument: Node) -> bool:
    """Whether an argument is a bias, which integer targets store as integers too."""
    place = 0 if node.target == torch.ops.aten.addmm.default else 2
    return len(node.args) > place and node.args[place] is argument


def _dequantizes_stored(node: Node) -> bool:
    namespace, _, operator = str(node.target).partition(".")
    if node.op != "call_function" or namespace != "quantized_decomposed":
        return False
    source: Any = node.args[0] if node.args else None
    return operator.partition(".")[0] in DEQUANTIZE and isinstance(source, Node) and source.op == "get_attr"


def _stored(model: GraphModule, node: Node) -> StoredWeight:
    args = [tensor_of(model, value) if isinstance(value, Node) else value for value in node.args]
    bits = 0
    for value in args[:3]:  # codes, scale, zero point; the latter two are numbers in the graph where per tensor
        bits += value.numel() * value.element_size() * 8 if isinstance(value, torch.Tensor) else 64
    with torch.no_grad():
        weight = node.target(*args, **node.kwargs)  # type: ignore[operator]
    user = next(iter(node.users))
    if user.target in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
        weight = weight.t()
    return StoredWeight(weight, bits)
