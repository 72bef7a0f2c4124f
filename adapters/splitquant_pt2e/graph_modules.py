"""The layers of an exported graph as modules, for passes that observe modules or put others in their places."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from splitquant_plugins.errors import InputError
from splitquant_pt2e.layers import CONVOLUTIONS, LayerCall, tensor_of

aten = torch.ops.aten
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class GraphModules(nn.Module):
    """Runs an exported graph, with modules in the places of some of its layers.

    `layers` are the calls of each layer, by its name. The modules, nn.Linear and nn.Conv1d/2d/3d, have these names and
    the graph's own weights, output channels first; layers that share a weight share the parameter. What takes a
    module's place here is called in its stead. The graph itself is left as it is, and takes batches as it was exported.
    """

    def __init__(self, model: GraphModule, layers: Mapping[str, Sequence[LayerCall]]) -> None:
        super().__init__()
        graph = Graph()
        copies: dict[Any, Any] = {}
        graph.output(graph.graph_copy(model.graph, copies))
        graph._codegen = copy.copy(model.graph._codegen)
        run = GraphModule(model, graph)
        shared: dict[int, nn.Parameter] = {}
        for number, (name, calls) in enumerate(layers.items()):
            self._put(name, _module(model, calls[0], shared))
            target = f"splitquant_layer_{number}"
            run.add_module(target, _Call(self, name))
            for call in calls:
                node = copies[call.node]
                inputs = replace(call, node=node).input  # which may be another layer's output, replaced by now
                with graph.inserting_before(node):
                    called = graph.call_module(target, (inputs,))
                node.replace_all_uses_with(called)
                graph.erase_node(node)
        run.recompile()
        self.__dict__["_graph"] = run  # not as a submodule: its modules are no layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the graph; InputError for inputs that it was not exported for."""
        try:
            return self.__dict__["_graph"](*args, **kwargs)
        except AssertionError as error:  # a guard of torch.export
            raise InputError(f"the graph was exported for other inputs: {error}") from error

    def _put(self, name: str, module: nn.Module) -> None:
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if leaf in owner._modules:  # a layer inside of another one, such as a module's own weight
            for child, inner in owner.get_submodule(leaf).named_children():
                module.add_module(child, inner)
        owner.add_module(leaf, module)


class _Call(nn.Module):
    """Calls what a model has under a name, at the time of the call."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["_model"] = model
        self.name = name

    def forward(self, inputs: Tensor) -> Any:
        return self.__dict__["_model"].get_submodule(self.name)(inputs)


def _module(model: GraphModule, call: LayerCall, shared: dict[int, nn.Parameter]) -> nn.Module:
    stored = tensor_of(model, call.weight)
    weight = shared.get(id(stored))
    if weight is None:
        weight = shared[id(stored)] = nn.Parameter((stored.t() if call.axis else stored).detach(), requires_grad=False)
    bias = None if call.bias is None else tensor_of(model, call.bias).detach()
    with torch.device("meta"):
        module = _empty(call, weight, bias is not None)
    module.weight = weight
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _empty(call: LayerCall, weight: Tensor, has_bias: bool) -> Any:
    if not call.kind.startswith("conv") or call.kind == "conv1d_hf":
        return nn.Linear(weight.shape[1], weight.shape[0], has_bias)
    args: list[Any] = list(call.node.args)
    defaults: list[Any] = [1, 0, 1, 1]
    given = args[3:7] if call.node.target in CONVOLUTIONS else [*args[3:6], args[8]]
    stride, padding, dilation, groups = given + defaults[len(given) :]
    spatial = weight.ndim - 2

    def full(value: Any) -> Any:
        sizes = (value,) if isinstance(value, int) else tuple(value)
        return sizes * spatial if len(sizes) == 1 else sizes

    return _CONVOLUTIONS[spatial](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        full(stride),
        padding if isinstance(padding, str) else full(padding),
        full(dilation),
        groups,
        has_bias,
    )
