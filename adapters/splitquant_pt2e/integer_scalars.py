"""A quantizer that leaves arithmetic on integers alone.

XNNPACKQuantizer turns the scalars of additions and products into float tensors before it annotates, also where integers
are added that index a tensor, as the attention masks of transformers' models do; such a graph no longer runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule


def leaving_integers(kind: type) -> Any:
    """Return a subclass of a quantizer's class whose transformation does not see nodes that make integers."""

    class IntegersLeft(kind):
        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            held = {
                node: node.target
                for node in model.graph.nodes
                if node.op == "call_function" and _is_integer(node.meta.get("val"))
            }
            for node in held:
                node.target = _out_of_sight
            try:
                transformed: GraphModule = super().transform_for_annotation(model)
            finally:
                for node, target in held.items():
                    node.target = target
                model.recompile()
            return transformed

    IntegersLeft.__name__ = IntegersLeft.__qualname__ = kind.__name__
    IntegersLeft.__module__ = kind.__module__
    return IntegersLeft


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _out_of_sight(*_: Any, **__: Any) -> Any:
    raise AssertionError("a transformation for annotation does not run the graph")
