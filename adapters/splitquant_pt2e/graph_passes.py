"""Passes that work on modules, such as DecoupleQPass, on the layers of an annotated graph.

The layers are shown to the pass as modules of a model that runs the graph; what it makes of them is written back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.fx import GraphModule

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.manifest import ATTRIBUTE, Manifest, set_manifest
from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.record import ignored_record
from splitquant_plugins.passes.split_layer import SplitTensors
from splitquant_pt2e.annotation import input_spec, resolved
from splitquant_pt2e.graph import GraphLayer, graph_layers, refuse_batchnorm_behind, refuse_unfit_graph, rewrite
from splitquant_pt2e.graph_modules import GraphModules
from splitquant_pt2e.integer_sums import INTEGER_NOTE, give_sums_scales, writes_integers
from splitquant_pt2e.layers import layer_calls, tensor_of
from splitquant_pt2e.observed_grid import grid_of_spec

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.passes.base import ModelPass

_EVERY = SplitConfig(k=1, split_bias=False, fold_batchnorm=False)


def apply_to_graph(model: GraphModule, first: ModelPass) -> Manifest:
    """Run a pass on the layers that an annotated graph quantizes, in place, and return the manifest.

    Calibration batches are what the graph takes: a graph of fixed sizes takes batches of these sizes. Modules behind
    one another are the only blocks that there are, since a graph has no others.

    Raises InputError for what is no exported float graph, and ConfigError for a pass that splits activations or puts
    in a layer's place what is no layer. The graph is changed only when the pass is through.
    """
    refuse_unfit_graph(model)
    if first.splits_activations:
        raise ConfigError("activations=True works on graphs with a single SplitQuantPass; leave it out, or the others")
    layers = graph_layers(model, _EVERY, annotated=True)
    chosen = {layer.name: layer for layer in layers if layer.reason is None}
    for layer in chosen.values():
        refuse_batchnorm_behind(layer)
    seen = GraphModules(model, {name: layer.calls for name, layer in chosen.items()})
    grids = {name: _grid(layer) for name, layer in chosen.items()}
    first.apply(seen, grid=grids.get)
    manifest = getattr(seen, ATTRIBUTE, None)
    if not isinstance(manifest, Manifest):
        raise ConfigError(f"{type(first).__name__} leaves no manifest, so what it did to a graph is not known")
    known = {record.name: record for record in manifest.layers}
    parts: list[tuple[GraphLayer, SplitTensors]] = []
    for name, layer in chosen.items():
        module = seen.get_submodule(name)
        if isinstance(module, SplitModule):
            made = [(_tensor(part.weight), part.bias) for part in module.parts()]
            weights, biases = zip(*made, strict=True)
            owner = known[name].shared_with if name in known else None
            stored = [None if bias is None else _tensor(bias) for bias in biases]
            parts.append((layer, SplitTensors(list(weights), stored, 0.0, shared_with=owner)))
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            _write(model, layer, _tensor(module.weight))
        else:
            raise ConfigError(f"{type(first).__name__} put a {type(module).__name__} in the place of {name}")
    integers = any(writes_integers(call) for layer in layers for call in layer.calls)
    calls = rewrite(model, parts)
    if integers and calls:
        give_sums_scales(calls)
        manifest.notes.append(INTEGER_NOTE)
    manifest.layers += [
        ignored_record(layer.names, str(layer.reason), layer.kind) for layer in layers if layer.reason is not None
    ]
    model.graph.lint()
    model.recompile()
    set_manifest(model, manifest)
    model.meta[ATTRIBUTE] = manifest
    return manifest


def _grid(layer: GraphLayer) -> Grid | None:
    call = layer.calls[0]
    try:
        return grid_of_spec(resolved(input_spec(call.node, call.weight)), call.axis)
    except ConfigError:
        return None  # the pass says of the layer that no grid is known


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach()


def _write(model: GraphModule, layer: GraphLayer, weight: Tensor) -> None:
    """Put a weight, output channels first, in the place of a whole layer's."""
    call = layer.calls[0]
    stored = tensor_of(model, call.weight)
    new = weight.t() if call.axis else weight
    if new.data_ptr() == stored.data_ptr():
        return
    reads = [node for node in model.graph.nodes if node.op == "get_attr" and tensor_of(model, node) is stored]
    readers = [each.node for each in layer_calls(model)]
    for user in (user for node in reads for user in node.users):
        if user not in readers:
            raise InputError(f"{layer.name}: its weight is also read by {user.name}; leave the layer out")
    parameter = nn.Parameter(new.contiguous(), requires_grad=stored.requires_grad)
    for target in {str(node.target) for node in reads}:
        path, _, leaf = target.rpartition(".")
        owner = model.get_submodule(path)
        delattr(owner, leaf)
        owner.register_parameter(leaf, parameter)
