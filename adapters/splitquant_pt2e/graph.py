"""The split of an exported aten graph: `module()` of what torch.export.export returns."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from joblib import Parallel, delayed
from torch import Tensor
from torch.fx import GraphModule

from splitquant_plugins.errors import AlreadyQuantizedError, AlreadySplitError, ConfigError, InputError
from splitquant_plugins.manifest import ATTRIBUTE, LayerRecord, Manifest, set_manifest
from splitquant_plugins.passes.checks import refuse_unfit_weights
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest
from splitquant_plugins.passes.select import (
    NOT_QUANTIZED,
    Layer,
    reason_to_ignore,
    refuse_unmatched_patterns,
    tied_reason,
)
from splitquant_plugins.passes.split_layer import SplitTensors, share_parts
from splitquant_plugins.plan import LayerPlan
from splitquant_pt2e.annotation import input_spec, redirect_all, resolved
from splitquant_pt2e.layers import NAME, LayerCall, innermost_module, layer_calls, layer_name, layer_plan, tensor_of
from splitquant_pt2e.observed_grid import grid_of_spec
from splitquant_pt2e.parallel_parts import Moves, PartStore, replace_call

if TYPE_CHECKING:
    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.passes.base import GridRule
    from splitquant_plugins.passes.splitquant import SplitQuantPass

aten = torch.ops.aten
_SPLIT_WEIGHT = re.compile(r"\.lower[._]weight$")
_SPLIT_MODULE = re.compile(r"splitquant_plugins\.modules\.Split")


@dataclass
class GraphLayer:
    """A layer of the graph with all of its calls; `reason` says why it stays whole."""

    names: list[str]
    calls: list[LayerCall]
    plan: LayerPlan | None
    reason: str | None = None
    grid: Grid | None = None
    tensors: SplitTensors | None = None
    shared_with: GraphLayer | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Its first name; a module that is called by several has several."""
        return self.names[0]


def split_graph(
    model: GraphModule, split_pass: SplitQuantPass, grid: Grid | GridRule | None = None, *, annotated: bool = False
) -> Manifest:
    """Split the Linear and convolution layers of an exported graph in place, and return the manifest.

    `model` is `torch.export.export(...).module()`; the outputs agree within rounding. A module that is called
    several times, and layers whose weights are tied, are split once and share the parts. With `annotated`, the
    graph carries the annotations of a PT2E quantizer: layers whose weight it does not quantize stay whole, the
    parts take over the layers' annotations, and `grid` is inferred from them.

    Raises InputError for what is no exported graph or holds no layer that can be split, AlreadySplitError,
    AlreadyQuantizedError, and ConfigError for patterns that match nothing or a splitter without its grid.
    """
    refuse_unfit_graph(model)
    refuse_unfit_pass(split_pass)
    started = time.perf_counter()
    manifest = new_manifest(split_pass.config, split_pass.splitter_options.model_dump())
    layers = _layers(model, split_pass.config, annotated)
    chosen = [layer for layer in layers if layer.reason is None and layer.plan is not None]
    refuse_unfit_weights([Layer(tuple(layer.names), model, layer.plan) for layer in chosen if layer.plan])
    for layer in chosen:
        layer.grid = _inferred_grid(layer, split_pass) if annotated else grid(layer.name) if callable(grid) else grid
        if layer.grid is None and split_pass.needs_grid:
            raise ConfigError(
                f"{_needs_grid(split_pass)}: pass a grid to split_graph, or attach the pass to a quantizer"
            )
    _split_tensors(chosen, split_pass)
    records = [_record(layer, split_pass) for layer in layers]
    if not any(record.action == "split" for record in records):
        raise InputError(_nothing_split(records))
    _rewrite(model, [layer for layer in chosen if layer.tensors and layer.tensors.reason is None])
    if split_pass.config.activations:
        from splitquant_pt2e.activations import split_activations

        manifest.notes += split_activations(model, split_pass.config, annotated=annotated)
    model.graph.lint()
    model.recompile()
    for record in records:
        manifest.layers.append(record)
        split_pass.plugins.after_layer(record)
    manifest.seconds = time.perf_counter() - started
    set_manifest(model, manifest)
    model.meta[ATTRIBUTE] = manifest  # prepare_pt2e and convert_pt2e hand on the meta, and no attributes
    split_pass.plugins.after_split(model, manifest)
    return manifest


def refuse_unfit_graph(model: Any) -> None:
    """Raise unless this is an exported float graph that was never split."""
    if isinstance(model, torch.export.ExportedProgram):
        raise InputError("pass the graph module of the exported program: exported.module()")
    if not isinstance(model, GraphModule):
        raise InputError(f"a graph split takes torch.export.export(model, ...).module(), not a {type(model).__name__}")
    if ATTRIBUTE in model.meta or getattr(model, ATTRIBUTE, None) is not None:
        raise AlreadySplitError("the graph was split before; export the model afresh")
    for node in model.graph.nodes:
        if str(node.target).startswith("quantized_decomposed."):
            raise AlreadyQuantizedError("the graph is quantized; split first, then quantize")
        if node.op == "get_attr" and _SPLIT_WEIGHT.search(str(node.target)):
            raise AlreadySplitError(f"{str(node.target).rpartition('.lower')[0]} was split before this graph was made")
        for _, kind in node.meta.get("nn_module_stack", {}).values():
            if _SPLIT_MODULE.search(kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"):
                raise AlreadySplitError(
                    "the model was split before it was exported; use the quantizer without the pass, or export the "
                    "unsplit model"
                )


def refuse_unfit_pass(split_pass: SplitQuantPass) -> None:
    """Raise ConfigError for options that do not work on graphs."""
    options = {
        "calibration": getattr(split_pass, "calibration", None),
        "budget": getattr(split_pass.config, "budget", None),
    }
    for option, value in options.items():
        if value is not None:
            raise ConfigError(
                f"SplitQuantPass option {option} does not work on exported graphs; apply the pass to the model before "
                "torch.export.export"
            )


def _layers(model: GraphModule, config: SplitConfig, annotated: bool) -> list[GraphLayer]:
    """Group the calls by layer, in order; layers whose weights are one tensor know of each other."""
    layers: dict[object, GraphLayer] = {}
    for call in layer_calls(model):
        name = layer_name(call)
        key = _identity(model, call) or name
        layer = layers.setdefault(key, GraphLayer([name], [], None, call.reason))
        layer.calls.append(call)
        if name not in layer.names:
            layer.names.append(name)
        call.node.meta[NAME] = layer.name
    firsts: dict[int, GraphLayer] = {}
    embeddings = _embedding_weights(model)
    for layer in layers.values():
        if layer.reason is not None:
            continue
        first = layer.calls[0]
        layer.plan = layer_plan(model, first, config.granularity)
        weight = id(tensor_of(model, first.weight))
        layer.reason = reason_to_ignore(layer.names, config)
        if weight in embeddings and not config.untie_embeddings:
            layer.reason = layer.reason or tied_reason(embeddings[weight])
        if annotated and layer.reason is None and not _is_quantized(layer):
            layer.reason = NOT_QUANTIZED
        if layer.reason is None:
            layer.shared_with = firsts.get(weight)
            firsts.setdefault(weight, layer)
    names = {name for layer in layers.values() for name in layer.names}
    modules = {name for node in model.graph.nodes for name, _ in node.meta.get("nn_module_stack", {}).values()}
    examples = ", ".join(sorted(names)[:3]) or "(none)"
    refuse_unmatched_patterns(config, names | modules, f"layer of the graph, such as {examples}")
    return list(layers.values())


def _identity(model: GraphModule, call: LayerCall) -> object | None:
    """What makes two calls those of one module: the same weight and the same bias."""
    if call.reason is not None or call.bias is None:
        return None
    return id(tensor_of(model, call.weight)), id(tensor_of(model, call.bias)), call.kind


def _is_quantized(layer: GraphLayer) -> bool:
    return all(resolved(input_spec(call.node, call.weight)) is not None for call in layer.calls)


def _embedding_weights(model: GraphModule) -> dict[int, str]:
    found = {}
    for node in model.graph.nodes:
        if node.target == aten.embedding.default and node.args[0].op == "get_attr":
            name = innermost_module(node)[0] or str(node.args[0].target)
            found[id(tensor_of(model, node.args[0]))] = name
    return found


def _inferred_grid(layer: GraphLayer, split_pass: SplitQuantPass) -> Grid | None:
    call = layer.calls[0]
    try:
        return grid_of_spec(resolved(input_spec(call.node, call.weight)), call.axis)
    except ConfigError as error:
        if not split_pass.needs_grid:
            return None
        raise ConfigError(
            f"{_needs_grid(split_pass)}, and it cannot be inferred from how the quantizer observes "
            f"{layer.name}.weight: {error}; use a splitter that needs no grid"
        ) from error


def _needs_grid(split_pass: SplitQuantPass) -> str:
    return f"splitter {split_pass.config.splitter!r} needs the grid that the parts will be rounded to"


def _split_tensors(layers: Sequence[GraphLayer], split_pass: SplitQuantPass) -> None:
    firsts = [layer for layer in layers if layer.shared_with is None]
    calls = (delayed(split_pass.split_tensors)(layer.name, layer.plan, layer.grid) for layer in firsts)
    results = Parallel(n_jobs=split_pass.jobs, prefer="threads", require="sharedmem")(calls)
    for layer, tensors in zip(firsts, results, strict=True):
        layer.tensors = tensors
    for layer in layers:
        if layer.shared_with is not None and layer.plan is not None:
            source = layer.shared_with.tensors
            assert source is not None  # the first of the layers that share a weight comes first
            layer.tensors = share_parts(layer.plan, layer.shared_with.name, source)


def _record(layer: GraphLayer, split_pass: SplitQuantPass) -> LayerRecord:
    if layer.tensors is None or layer.plan is None:
        return ignored_record(layer.names, layer.reason or "", layer.calls[0].kind)
    return layer_record(layer.names, layer.plan, layer.tensors, split_pass.config.splitter)


def _nothing_split(records: Sequence[LayerRecord]) -> str:
    if not records:
        return (
            "the graph has no Linear or convolution to split; pass torch.export.export(model, ...).module(), before "
            "its layers are decomposed"
        )
    reasons = "; ".join(f"{record.name}: {record.reason}" for record in records[:3])
    return f"no layer of the graph was split ({reasons}{'; …' if len(records) > 3 else ''})"


def _rewrite(model: GraphModule, layers: Sequence[GraphLayer]) -> None:
    store, moves = PartStore(model), Moves()
    weights: dict[int, list[str | None]] = {}
    for layer in layers:
        assert layer.tensors is not None
        k = len(layer.tensors.weight)
        key = id(layer.shared_with or layer)
        if key not in weights:
            stored = [part.t() if layer.calls[0].axis else part for part in layer.tensors.weight]
            weights[key] = store.put(layer.name, k, "weight", stored)
        biases = store.put(layer.name, k, "bias", layer.tensors.bias)
        for call in layer.calls:
            weight_nodes = [store.read(call.weight, i, target) for i, target in enumerate(weights[key])]
            bias_nodes = [None if call.bias is None else store.read(call.bias, i, t) for i, t in enumerate(biases)]
            replace_call(model, call, layer.name, [w for w in weight_nodes if w is not None], bias_nodes, moves)
    redirect_all(model, moves)
    _delete_unused(
        model, [node for layer in layers for call in layer.calls for node in (call.weight, call.bias) if node]
    )


def _delete_unused(model: GraphModule, nodes: Sequence[Any]) -> None:
    """Erase the unused ones of the nodes that read the original tensors, and these under all their names."""
    originals = {_memory(tensor_of(model, node)) for node in nodes}
    for node in list(model.graph.nodes):
        if node.op == "get_attr" and not node.users and _memory(tensor_of(model, node)) in originals:
            model.graph.erase_node(node)
    used = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for target, tensor in tensors:
        if _memory(tensor) in originals and target not in used:
            owner, _, leaf = target.rpartition(".")
            delattr(model.get_submodule(owner), leaf)


def _memory(value: Any) -> tuple:
    """What tensors under several names have in common; a get_attr node may also read a subgraph."""
    return (value.data_ptr(), value.shape, value.stride()) if isinstance(value, Tensor) else (id(value),)
