"""The split of an exported aten graph: `module()` of what torch.export.export returns."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import (
    AlreadyQuantizedError,
    AlreadySplitError,
    ConfigError,
    InputError,
    SplitQuantWarning,
)
from splitquant_plugins.grid import Grid
from splitquant_plugins.manifest import ATTRIBUTE, LayerRecord, Manifest, set_manifest
from splitquant_plugins.passes.base import GridRule
from splitquant_plugins.passes.calibration import CALIBRATED_KINDS, iter_second_moments
from splitquant_plugins.passes.checks import refuse_unfit_weights
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest, warn_of_harm
from splitquant_plugins.passes.select import (
    NOT_QUANTIZED,
    Layer,
    reason_to_ignore,
    refuse_unmatched_patterns,
    tied_reason,
)
from splitquant_plugins.passes.split_layer import SplitTensors, check_split
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plan import Skip
from splitquant_pt2e.annotation import input_spec, redirect_all, resolved
from splitquant_pt2e.graph_modules import GraphModules
from splitquant_pt2e.integer_sums import (
    INTEGER_NOTE,
    give_sums_scales,
    output_spec,
    sum_costs,
    weighed,
    writes_integers,
)
from splitquant_pt2e.layers import NAME, LayerCall, innermost_module, layer_calls, layer_name, layer_plan, tensor_of
from splitquant_pt2e.observed_grid import grid_of_spec
from splitquant_pt2e.parallel_parts import Moves, PartStore, SplitCall, replace_call

aten = torch.ops.aten
_BATCHNORM = (aten.batch_norm.default, aten._native_batch_norm_legit.default, aten.cudnn_batch_norm.default)
_SPLIT_WEIGHT = re.compile(r"\.lower[._]weight$")
_SPLIT_MODULE = re.compile(r"splitquant_plugins\.modules\.Split")


@dataclass(frozen=True)
class GraphLayer(Layer):
    """A layer of the graph, which is its `module`, with all of its calls."""

    calls: tuple[LayerCall, ...]

    @property
    def kind(self) -> str:
        return self.calls[0].kind


def split_graph(
    model: GraphModule, split_pass: SplitQuantPass, grid: Grid | GridRule | None = None, *, annotated: bool = False
) -> Manifest:
    """Split the Linear and convolution layers of an exported graph in place, and return the manifest.

    `model` is `torch.export.export(...).module()`; the outputs agree within rounding. A module that is called
    several times, and layers whose weights are tied, are split once and share the parts. With `annotated`, the
    graph carries the annotations of a PT2E quantizer: layers whose weight it does not quantize stay whole, the
    parts take over the layers' annotations, and `grid` is inferred from them.

    Where every layer stays whole because its split would gain nothing, a warning says so.

    The pass's calibration batches are run through the graph, so they are what the graph takes.

    Raises InputError for what is no exported graph or holds no layer that can be split, or does not take the
    calibration batches; AlreadySplitError, AlreadyQuantizedError, and ConfigError for patterns that match nothing or a
    splitter or calibration without a grid.
    """
    refuse_unfit_graph(model)
    split_pass.refuse_missing_calibration()
    started = time.perf_counter()
    manifest = new_manifest(split_pass.config, split_pass.splitter_options.model_dump())
    layers = graph_layers(model, split_pass.config, annotated=annotated)
    chosen = [layer for layer in layers if layer.reason is None]
    refuse_unfit_weights(chosen)
    for layer in chosen if annotated else ():
        refuse_batchnorm_behind(layer)
    grids = {layer.name: _grid(layer, split_pass, grid, annotated=annotated) for layer in chosen}
    seen: nn.Module = model
    if split_pass.calibration is not None:
        seen = GraphModules(model, {layer.name: layer.calls for layer in chosen})
        chosen = [replace(layer, module=seen.get_submodule(layer.name)) for layer in chosen]
    split = {
        layer.name: check_split(layer.name, layer.plan, tensors)
        for layer, tensors in split_pass.split_layers(seen, chosen, grids.get)
    }
    if not chosen:
        raise InputError(_nothing_split([_record(layer, None) for layer in layers]))
    integers = annotated and any(writes_integers(call) for layer in layers for call in layer.calls)
    if integers:
        specs = {layer.name: output_spec(layer.calls[0].node) for layer in chosen}
        costs = sum_costs(split, specs, _moments(seen, chosen, split_pass))
        split = weighed(split, specs, costs, split_pass.config.splitter)
    records = [_record(layer, split.get(layer.name)) for layer in layers]
    if not any(record.action == "split" for record in records):
        warnings.warn(_nothing_split(records), SplitQuantWarning, stacklevel=2)
    calls = rewrite(model, [(layer, split[layer.name]) for layer in chosen if split[layer.name].reason is None])
    if integers:
        give_sums_scales(calls)
        manifest.notes.append(INTEGER_NOTE)
    if split_pass.config.activations:
        from splitquant_pt2e.activations import split_activations

        manifest.notes += split_activations(model, split_pass.config, annotated=annotated)
    model.graph.lint()
    model.recompile()
    for record in records:
        manifest.layers.append(record)
        split_pass.plugins.after_layer(record)
    manifest.seconds = time.perf_counter() - started
    warn_of_harm(manifest)
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


def refuse_batchnorm_behind(layer: GraphLayer) -> None:
    """Raise ConfigError for a BatchNorm behind a layer, which prepare_pt2e would have folded, and prepare_qat_pt2e not.

    Quantization-aware training fuses the two where it finds them side by side, once the quantizer has annotated them;
    between the parts and the BatchNorm there is a sum.
    """
    for call in layer.calls:
        users = list(call.node.users)
        if len(users) == 1 and users[0].target in _BATCHNORM:
            raise ConfigError(
                f"{layer.name} has a BatchNorm behind it that was not folded: prepare_qat_pt2e trains the two as one, "
                "and a split layer cannot be fused with it. Fold BatchNorms into the model before torch.export.export, "
                "or train without the pass and split when training is done"
            )


def _moments(
    model: nn.Module, layers: Sequence[GraphLayer], split_pass: SplitQuantPass
) -> Iterator[tuple[str, Tensor]]:
    """Yield the second moments of the layers' inputs, by name, once more; none without calibration."""
    batches = split_pass.calibration
    if batches is None:
        return
    if isinstance(batches, Iterator):
        raise InputError(
            "calibration: for a target that quantizes partial sums the batches are read twice, but they are a one-shot "
            "iterator; pass a list, a DataLoader, or a function that returns an iterator"
        )
    modules = {layer.name: layer.module for layer in layers if layer.plan.kind in CALIBRATED_KINDS}
    limit = max(split_pass.calibration_bytes, 1)
    for name, moment in iter_second_moments(model, batches, modules, dtype=torch.float32, max_bytes=limit):
        if moment.samples:
            yield name, moment.matrix


def graph_layers(model: GraphModule, config: SplitConfig, *, annotated: bool) -> list[GraphLayer]:
    """Group the calls by layer, in order, and say of each layer how it is to be split, or why it is ignored.

    With `annotated`, layers whose weight the quantizer leaves float are ignored.
    """
    names: dict[object, list[str]] = {}
    calls: dict[object, list[LayerCall]] = {}
    for call in layer_calls(model):
        name = layer_name(call)
        key = _identity(model, call) or name
        calls.setdefault(key, []).append(call)
        known = names.setdefault(key, [])
        known += [name] if name not in known else []
        call.node.meta[NAME] = known[0]
    every = {name for known in names.values() for name in known}
    modules = {name for node in model.graph.nodes for name, _ in node.meta.get("nn_module_stack", {}).values()}
    examples = ", ".join(sorted(every)[:3]) or "(none)"
    refuse_unmatched_patterns(config, every | modules, f"layer of the graph, such as {examples}")
    embeddings = _embedding_weights(model)
    layers = []
    for key, known in names.items():
        reason = calls[key][0].reason or _reason(model, known, calls[key], config, embeddings, annotated)
        answer = Skip(reason) if reason else layer_plan(model, calls[key][0], config.granularity)
        layers.append(GraphLayer(tuple(known), model, answer, tuple(calls[key])))
    return layers


def _reason(
    model: GraphModule,
    names: Sequence[str],
    calls: Sequence[LayerCall],
    config: SplitConfig,
    embeddings: dict[int, str],
    annotated: bool,
) -> str | None:
    """Why a layer that could be split is ignored; None where it is not."""
    if reason := reason_to_ignore(names, config):
        return reason
    embedding = embeddings.get(id(tensor_of(model, calls[0].weight)))
    if embedding is not None and not config.untie_embeddings:
        return tied_reason(embedding)
    if annotated and any(resolved(input_spec(call.node, call.weight)) is None for call in calls):
        return NOT_QUANTIZED
    return None


def _identity(model: GraphModule, call: LayerCall) -> object | None:
    """What makes two calls those of one module: the same weight and the same bias."""
    if call.reason is not None or call.bias is None:
        return None
    return id(tensor_of(model, call.weight)), id(tensor_of(model, call.bias)), call.kind


def _embedding_weights(model: GraphModule) -> dict[int, str]:
    found = {}
    for node in model.graph.nodes:
        if node.target == aten.embedding.default and node.args[0].op == "get_attr":
            name = innermost_module(node)[0] or str(node.args[0].target)
            found[id(tensor_of(model, node.args[0]))] = name
    return found


def _grid(
    layer: GraphLayer, split_pass: SplitQuantPass, grid: Grid | GridRule | None, *, annotated: bool
) -> Grid | None:
    """The grid that a layer's parts will be rounded to: the one given, or inferred from the annotations."""
    who = f"splitter {split_pass.config.splitter!r}" if split_pass.config.budget is None else "budget"
    needs = f"{who} needs the grid that the parts will be rounded to"
    if not annotated:
        given = grid(layer.name) if callable(grid) else grid
        if given is None and split_pass.needs_grid:
            raise ConfigError(f"{needs}: pass a grid to split_graph, or attach the pass to a quantizer")
        if given is None and split_pass.calibration is not None:
            raise ConfigError(
                "calibration weighs the errors that a grid makes, and none is known: pass a grid to split_graph, or "
                "attach the pass to a quantizer"
            )
        return given
    call = layer.calls[0]
    try:
        return grid_of_spec(resolved(input_spec(call.node, call.weight)), call.axis)
    except ConfigError as error:
        if not split_pass.needs_grid:
            return None
        raise ConfigError(
            f"{needs}, and it cannot be inferred from how the quantizer observes {layer.name}.weight: {error}; use a "
            "splitter that needs no grid"
        ) from error


def _record(layer: GraphLayer, tensors: SplitTensors | None) -> LayerRecord:
    if tensors is None:
        return ignored_record(layer.names, str(layer.reason), layer.kind)
    return layer_record(layer.names, layer.plan, tensors)


def _nothing_split(records: Sequence[LayerRecord]) -> str:
    if not records:
        return (
            "the graph has no Linear or convolution to split; pass torch.export.export(model, ...).module(), before "
            "its layers are decomposed"
        )
    reasons = "; ".join(f"{record.name}: {record.reason}" for record in records[:3])
    return f"no layer of the graph was split ({reasons}{'; …' if len(records) > 3 else ''})"


def rewrite(model: GraphModule, layers: Sequence[tuple[GraphLayer, SplitTensors]]) -> list[SplitCall]:
    """Put parts in the places of layers, and return what took the place of each call."""
    store, moves = PartStore(model), Moves()
    made: list[SplitCall] = []
    weights: dict[str, list[str | None]] = {}
    for layer, tensors in layers:
        k = len(tensors.weight)
        owner = tensors.shared_with or layer.name
        if owner not in weights:
            stored = [part.t() if layer.calls[0].axis else part for part in tensors.weight]
            weights[owner] = store.put(layer.name, k, "weight", stored)
        biases = store.put(layer.name, k, "bias", tensors.bias)
        for call in layer.calls:
            weight_nodes = [store.read(call.weight, i, target) for i, target in enumerate(weights[owner])]
            bias_nodes = [None if call.bias is None else store.read(call.bias, i, t) for i, t in enumerate(biases)]
            kept = [node for node in weight_nodes if node is not None]
            made.append(replace_call(model, call, layer.name, kept, bias_nodes, moves))
    redirect_all(model, moves)
    _delete_unused(
        model, [node for layer, _ in layers for call in layer.calls for node in (call.weight, call.bias) if node]
    )
    return made


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
