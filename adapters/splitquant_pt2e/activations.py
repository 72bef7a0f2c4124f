"""Activations of a graph in k chunks along their features, each with a scale and zero point of its own.

Stock quantizers give the chunks one scale: they annotate what the concatenation makes of them, or force its
inputs to share. Here each chunk's output is quantized, and the concatenation is not quantized again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.passes.select import reason_to_ignore
from splitquant_pt2e import compat
from splitquant_pt2e.annotation import annotation_of, input_spec, references, resolved
from splitquant_pt2e.layers import CONVOLUTIONS
from splitquant_pt2e.mixing import with_mixin

aten = torch.ops.aten
_NAMES = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid hardswish hardsigmoid hardtanh softplus "
    "log_sigmoid hardshrink softshrink"
)
# Each, and its variant that works in place, with what takes its place.
ELEMENTWISE = {
    getattr(aten, variant).default: getattr(aten, name).default
    for name in _NAMES.split()
    for variant in (name, f"{name}_")
    if hasattr(aten, variant)
}
# What leaves features where they are, so that the layer before it tells their dimension.
TRANSPARENT = {
    *ELEMENTWISE,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.dropout.default,
    aten.batch_norm.default,
    aten.layer_norm.default,
}


def split_activations(model: GraphModule, config: SplitConfig, *, annotated: bool) -> list[str]:
    """Cut every elementwise activation of the graph into `config.k` chunks; return notes for the manifest.

    With `annotated`, only activations that the recipe quantizes are cut, and each chunk gets qparams of its own.
    """
    notes = []
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in ELEMENTWISE:
            continue
        name = _name(node)
        if reason_to_ignore([name], config) is not None:
            continue
        spec = _output_spec(node) if annotated else None
        dim = _feature_dim(node, config)
        reason = _reason(model, node, spec, dim, config.k, annotated)
        if reason is not None or dim is None:
            notes.append(f"activation {name} ({node.target}) is left whole: {reason}")
            continue
        chunks, joined = _cut(model, node, dim, config.k)
        if annotated:
            _give_scales(chunks, joined, spec)
        notes.append(f"activation {name} ({node.target}) is split in {config.k} along {dim}")
    return notes


def chunk_scales(quantizer: Any) -> Any:
    """Return a quantizer of the same kind that gives each chunk of a split activation its own qparams.

    It is for graphs of models that SplitQuantPass(activations=True) split before torch.export.export;
    `SplitQuantPass(activations=True) + quantizer` does it by itself.
    """
    return with_mixin(quantizer, _ChunkingQuantizer, "Chunked")


class _ChunkingQuantizer:
    def annotate(self, model: GraphModule) -> GraphModule:
        annotated = super().annotate(model)  # type: ignore[misc]
        give_chunks_scales(model)
        return annotated


def give_chunks_scales(model: GraphModule) -> int:
    """Annotate every chunk-wise activation of an annotated graph; return the number of activations found."""
    found = 0
    for node in model.graph.nodes:
        chunks = _chunks_of(node)
        spec = None if chunks is None else _output_spec(node)
        if chunks is None or spec is None or not _own_spec(spec) or _shared(model, node, besides=node):
            continue
        _give_scales(chunks, node, spec)
        found += 1
    return found


def _chunks_of(node: Node) -> Sequence[Node] | None:
    """Return the activations that a concatenation joins, where they are applied to chunks of one tensor."""
    if node.target != aten.cat.default or not isinstance(node.args[0], (list, tuple)) or len(node.args[0]) < 2:
        return None
    chunks: list[Any] = list(node.args[0])
    if not all(isinstance(chunk, Node) and chunk.target in ELEMENTWISE for chunk in chunks):
        return None
    sources = {_source_of_chunk(chunk.args[0]) for chunk in chunks}
    return chunks if len(sources) == 1 and None not in sources else None


def _source_of_chunk(node: Any) -> Node | None:
    if not isinstance(node, Node) or not node.args:
        return None
    if node.target == aten.slice.Tensor:
        return node.args[0]  # type: ignore[return-value]
    source: Any = node.args[0]
    return source if isinstance(source, Node) and "split" in str(source.target) else None


def _name(node: Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    owner, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__module__
    if "activation" in kind.lower() and "MultiheadAttention" not in kind:
        return owner
    return f"{owner}.{node.name}".strip(".")


def _feature_dim(node: Node, config: SplitConfig) -> int | None:
    """Dimension, from the front, that holds the features; None where no layer before the node tells it."""
    rank = node.meta["val"].ndim if "val" in node.meta else None
    if rank is None:
        return None
    if config.activation_dim is not None:
        return config.activation_dim % rank if -rank <= config.activation_dim < rank else None
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.target in (aten.linear.default, aten.addmm.default):
            return rank - 1
        if current.target in CONVOLUTIONS:
            return rank - 1 - CONVOLUTIONS[current.target]
        if current.target == aten.convolution.default:
            return 1
        if current.target in TRANSPARENT:
            new = [source for source in current.all_input_nodes if source not in seen]
            seen.update(new)
            pending += reversed(new)
    return None


def _output_spec(node: Node) -> Any | None:
    """How a node's output is quantized: by itself, or else by the first user that asks for it."""
    annotation = annotation_of(node)
    specs = [] if annotation is None else [annotation.output_qspec]
    specs += [input_spec(user, node) for user in node.users]
    if annotation is not None:
        specs += list((annotation.input_qspec_map or {}).values()) if node.target == aten.cat.default else []
    return next((found for found in map(resolved, specs) if found is not None), None)


def _own_spec(spec: Any) -> bool:
    """Whether a specification lets an observer find scales; fixed and derived ones do not."""
    return hasattr(spec, "observer_or_fake_quant_ctr")


def _shared(model: GraphModule, node: Node, besides: Node | None = None) -> bool:
    """Whether another place of the graph is to have the same scale as this node's output."""
    for place in references(model):
        source, user = place if isinstance(place, tuple) else (place, None)
        if source is node and user is not besides:
            return True
    return False


def _reason(model: GraphModule, node: Node, spec: Any, dim: int | None, k: int, annotated: bool) -> str | None:
    if dim is None:
        return "no layer before it tells where its features are; give activation_dim"
    size = node.meta["val"].shape[dim]
    if not isinstance(size, int):
        return "the number of its features is dynamic"
    if size < k:
        return f"it has {size} features for {k} chunks"
    if str(node.target).partition(".default")[0].endswith("_") and len(node.all_input_nodes[0].users) > 1:
        return "it works in place on a tensor that others read"
    if annotated and spec is None:
        return "the recipe does not quantize it"
    if annotated and not _own_spec(spec):
        return "the recipe fixes its scale"
    if annotated and _shared(model, node):
        return "the recipe makes it share its scale with another place"
    return None


def _cut(model: GraphModule, node: Node, dim: int, k: int) -> tuple[list[Node], Node]:
    """Replace an activation by slices, k activations and a concatenation."""
    size = node.meta["val"].shape[dim]
    ends = [0]
    for number in range(k):
        ends.append(ends[-1] + size // k + (number < size % k))
    source = node.args[0]
    graph, chunks = model.graph, []
    with graph.inserting_before(node):
        for start, end in itertools.pairwise(ends):
            piece = _call(model, aten.slice.Tensor, (source, dim, start, end), node)
            chunks.append(_call(model, ELEMENTWISE[node.target], (piece, *node.args[1:]), node, node.kwargs))
        joined = _call(model, aten.cat.default, (chunks, dim), node)
    node.replace_all_uses_with(joined)
    for user in joined.users:
        annotation = annotation_of(user)
        if annotation is not None and node in (annotation.input_qspec_map or {}):
            moved = {joined if key is node else key: spec for key, spec in annotation.input_qspec_map.items()}
            user.meta[compat.ANNOTATION] = replace(annotation, input_qspec_map=moved)
    graph.erase_node(node)
    return chunks, joined


def _call(model: GraphModule, target: Any, args: tuple, like: Node, kwargs: Any = None) -> Node:
    node = model.graph.call_function(target, args, dict(kwargs or {}))
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace", "from_node") if key in like.meta}
    node.meta["source_fn_stack"] = [(node.name, target)]
    node.meta["torch_fn"] = (node.name, f"function.{node.name}")
    values = torch.fx.map_arg((args, dict(kwargs or {})), lambda one: one.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _give_scales(chunks: Sequence[Node], joined: Node, spec: Any) -> None:
    """Quantize the output of each chunk, and nothing of the concatenation."""
    # Quantizers that annotate once more look for what their own class of annotations has.
    users = [annotation_of(user) for user in joined.users]
    kind = next((type(found) for found in users if found is not None), compat.QuantizationAnnotation)
    for chunk in chunks:
        own = annotation_of(chunk) or kind(_annotated=True)
        chunk.meta[compat.ANNOTATION] = replace(own, output_qspec=spec)
    joined.meta[compat.ANNOTATION] = kind(_annotated=True)
    for user in joined.users:
        annotation = annotation_of(user)
        if annotation is not None and joined in (annotation.input_qspec_map or {}):
            others = {key: value for key, value in annotation.input_qspec_map.items() if key is not joined}
            user.meta[compat.ANNOTATION] = replace(annotation, input_qspec_map=others)
