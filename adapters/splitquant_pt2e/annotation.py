"""Annotations of PT2E nodes, moved from a layer to its parts.

An annotation says how the inputs and the output of a node are to be quantized. It refers to other places of
the graph by node or by edge (input, consumer); what is replaced has to be replaced there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from splitquant_pt2e.compat import ANNOTATION, QuantizationAnnotation

Place = Any  # a Node, or a tuple (input, consumer) of nodes


def annotation_of(node: Node) -> Any | None:
    """Return the annotation of a node."""
    return node.meta.get(ANNOTATION)


def input_spec(node: Node, argument: Node) -> Any | None:
    """Return how a node wants an input quantized, None where it does not."""
    annotation = annotation_of(node)
    return None if annotation is None else (annotation.input_qspec_map or {}).get(argument)


def set_untouched(node: Node, like: Any | None) -> None:
    """Mark a node as annotated with nothing, so that neither its inputs nor its output are quantized."""
    if like is None:
        node.meta[ANNOTATION] = QuantizationAnnotation(_annotated=True)
    else:
        node.meta[ANNOTATION] = replace(like, input_qspec_map={}, output_qspec=None)


def redirect(spec: Any, move: Callable[[Place], Place]) -> Any:
    """Return a specification with the places that it refers to moved."""
    if hasattr(spec, "edge_or_node"):
        return replace(spec, edge_or_node=move(spec.edge_or_node))
    if hasattr(spec, "derived_from"):
        return replace(spec, derived_from=[move(place) for place in spec.derived_from])
    return spec


def redirect_all(model: GraphModule, move: Callable[[Place], Place]) -> None:
    """Move the places that any annotation of the graph refers to, its own inputs included."""
    for node in model.graph.nodes:
        annotation = annotation_of(node)
        if annotation is None:
            continue
        inputs = annotation.input_qspec_map or {}
        node.meta[ANNOTATION] = replace(
            annotation,
            input_qspec_map={move((key, node))[0]: redirect(spec, move) for key, spec in inputs.items()},
            output_qspec=redirect(annotation.output_qspec, move),
        )


def references(model: GraphModule) -> Iterator[Place]:
    """Yield the places that shared and derived specifications refer to."""
    for node in model.graph.nodes:
        annotation = annotation_of(node)
        if annotation is None:
            continue
        for spec in (*(annotation.input_qspec_map or {}).values(), annotation.output_qspec):
            if hasattr(spec, "edge_or_node"):
                yield spec.edge_or_node
            yield from getattr(spec, "derived_from", ())


def resolved(spec: Any) -> Any | None:
    """Follow shared specifications to the one that says something."""
    seen: list[Any] = []
    while hasattr(spec, "edge_or_node"):
        place = spec.edge_or_node
        if place in seen:
            return None
        seen.append(place)
        if isinstance(place, tuple):
            spec = input_spec(place[1], place[0])
        else:
            annotation = annotation_of(place)
            spec = None if annotation is None else annotation.output_qspec
    return spec
