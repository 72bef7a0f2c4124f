"""Folding BatchNorm into the convolution before it: W' = W γ/√(σ²+ε), b' = (b − μ) γ/√(σ²+ε) + β."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from splitquant_plugins.passes.module_tree import occurrences, replace_module

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def fold_batchnorms(model: nn.Module) -> list[str]:
    """Fold each BatchNorm in evaluation mode whose only input is a convolution; return notes.

    Which layer follows which is read off a symbolic trace of the whole model. Where that cannot be traced its
    children are, and a pair counts only if no module above can reach it by name: see `_out_of_reach`. Nor does it count
    where the trace is not all there is: see `_uses_apart_from_forward`. A BatchNorm that cannot be folded stays, which
    keeps the model's outputs too.
    """
    places = {id(module): names for module, names in occurrences(model)}
    batchnorms = {
        id(module): (module, names[0]) for module, names in occurrences(model) if isinstance(module, BATCHNORMS)
    }
    if not batchnorms:
        return []
    notes = []
    unseen: dict[int, str] = {}
    for conv, norm in _conv_batchnorm_pairs(model, (), unseen):
        shared = len(places.get(id(conv), ())) != 1 or len(places.get(id(norm), ())) != 1
        if id(norm) not in batchnorms or shared or not _foldable(conv, norm):
            continue
        name = batchnorms.pop(id(norm))[1]
        _fold(conv, norm)
        replace_module(model, name, nn.Identity())
        notes.append(f"BatchNorm {name} is folded into {places[id(conv)][0]}")
    notes += [
        f"BatchNorm {name} is not folded: {_why_not(norm, unseen.get(id(norm)))}" for norm, name in batchnorms.values()
    ]
    return notes


def _conv_batchnorm_pairs(
    module: nn.Module, above: tuple[nn.Module, ...], unseen: dict[int, str]
) -> list[tuple[Convolution, BatchNorm]]:
    """Pairs of modules that run directly after one another wherever either of them runs.

    `above` are the modules above that could not be traced; norms of pairs that may be used in ways that were not traced
    are noted in `unseen`, with the reason.
    """
    if not any(isinstance(child, BATCHNORMS) for child in module.modules()):
        return []
    try:
        graphs = _traces(module)
    except Exception:  # tracing runs the model's own code on proxies, which may fail in any way
        above = (*above, module)
        return [pair for child in module.children() for pair in _conv_batchnorm_pairs(child, above, unseen)]
    first, *others = [_pairs(module, graph) for graph in graphs]
    pairs = [pair for pair in first if all(pair in other for other in others)]
    for _, norm in (pair for pair in pairs if not all(_out_of_reach(each, module, pair) for each in above)):
        unseen[id(norm)] = "a module above it cannot be traced, and may use the two in other ways, too"
    uses = _uses_apart_from_forward(module, graphs)
    for conv, norm in pairs:
        reason = next((why for each, why in uses.items() if each in (id(conv), id(norm))), None)
        if reason is not None:
            unseen.setdefault(id(norm), reason)
    return [pair for pair in pairs if id(pair[1]) not in unseen]


def _uses_apart_from_forward(traced: nn.Module, graphs: list[fx.Graph]) -> dict[int, str]:
    """Say of modules, by id, why the trace of `forward` does not tell all that they are used for.

    A method that `forward` does not lead to may run one of them, and a norm beside them that did not run may take the
    place of theirs at another time.
    """
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    read = {kind: _names_apart_from_forward(kind) for kind in {type(module) for module in traced.modules()}}
    modules = dict(traced.named_modules())
    idle: dict[str, str] = {}  # a norm that did not run, by what holds it
    for path, module in modules.items():
        if isinstance(module, BATCHNORMS) and path not in called:
            idle.setdefault(path.rpartition(".")[0], path.rpartition(".")[2])
    by_method: dict[str, str] = {}
    found: dict[int, str] = {}
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        owner = modules.get(above)
        if above in by_method:
            by_method[path] = by_method[above]
        elif path and owner is not None and name in read[type(owner)]:
            by_method[path] = f"{type(owner).__name__}.{read[type(owner)][name]} uses {name}, too"
        if path in by_method:
            found[id(module)] = by_method[path]
        elif path and above in idle:
            found[id(module)] = f"{idle[above]} beside it did not run, and may run in its place"
    return found


def _names_apart_from_forward(kind: type[nn.Module]) -> dict[str, str]:
    """Names that are read by methods which neither forward nor the constructor leads to, and the first such method.

    Of torch's own classes nothing is read.
    """
    own = [each for each in reversed(kind.__mro__) if not each.__module__.startswith(("torch.", "builtins"))]
    methods = {name: _function(each) for kind in own for name, each in vars(kind).items()}
    methods = {name: function for name, function in methods.items() if function is not None}
    reached, new = set[str](), {"forward", "__init__"} & set(methods)
    while new:
        reached |= new
        new = _names_read([methods[name] for name in new]) & set(methods) - reached
    found: dict[str, str] = {}
    for method in sorted(set(methods) - reached):
        for name in _names_read([methods[method]]):
            found.setdefault(name, method)
    return found


def _function(attribute: object) -> Any:
    """Return the function behind a method of any kind, or None."""
    attribute = getattr(attribute, "fget", getattr(attribute, "func", getattr(attribute, "__func__", attribute)))
    found = inspect.unwrap(attribute) if callable(attribute) else None
    return found if inspect.isfunction(found) else None


def _out_of_reach(above: nn.Module, traced: nn.Module, pair: tuple[nn.Module, nn.Module]) -> bool:
    """Whether a module that cannot be traced has no way to a pair inside a traced one.

    So it is with lists of modules, which hold no code, and with the classes of transformers whose code nowhere
    names the two. Of other classes nobody has read the code.
    """
    if type(above) in (nn.ModuleList, nn.ModuleDict):
        return True
    if not type(above).__module__.startswith("transformers.models."):
        return False
    names = {n.rpartition(".")[2] for n, m in traced.named_modules() if any(m is each for each in pair)}
    code = {name for kind in type(above).__mro__ for name in _names_in(kind)}
    return not any(name.isdecimal() for name in names) and not names & code


def _names_in(kind: type) -> set[str]:
    """Every name that the methods of a class read; its constructor only says where its modules go."""
    if not kind.__module__.startswith("transformers.models."):
        return set()
    functions = [_function(each) for name, each in vars(kind).items() if name != "__init__"]
    return _names_read([each for each in functions if each is not None])


def _names_read(functions: Iterable[Any]) -> set[str]:
    """Every name, and every string that may be one, in the code of functions."""
    found: set[str] = set()
    codes = [each.__code__ for each in functions]
    while codes:
        code = codes.pop()
        found.update(code.co_names, (const for const in code.co_consts if isinstance(const, str)))
        codes += [const for const in code.co_consts if inspect.iscode(const)]
    return found


def _traces(module: nn.Module) -> list[fx.Graph]:
    """Trace a module with its optional arguments given, and with their defaults: `if mask is None` may branch."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    graphs = [_Tracer().trace(module)]
    return [*graphs, _Tracer().trace(module, concrete_args=defaults)] if defaults else graphs


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a statistic read by hand is seen


def _pairs(module: nn.Module, graph: fx.Graph) -> list[tuple[Convolution, BatchNorm]]:
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        if node.op == "get_attr":  # a tensor read by hand, perhaps a weight that folding would change
            calls[str(node.target).rpartition(".")[0]] = 2
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls[str(node.target)] == 1 and calls[str(before.target)] == 1:
            conv, norm = module.get_submodule(str(before.target)), module.get_submodule(str(node.target))
            if isinstance(conv, CONVOLUTIONS) and isinstance(norm, BATCHNORMS):
                pairs.append((conv, norm))
    return pairs


def _foldable(conv: Convolution, norm: BatchNorm) -> bool:
    plain = type(conv) in CONVOLUTIONS and type(norm) in BATCHNORMS and "weight" in conv._parameters
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in (conv, norm))
    return plain and not hooks and not norm.training and norm.running_mean is not None


def _why_not(norm: BatchNorm, unseen: str | None) -> str:
    if norm.training:
        return "it is in training mode; call model.eval() first"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if unseen is not None:
        return unseen
    return "it does not directly follow a convolution of its own"


@torch.no_grad()
def _fold(conv: Convolution, norm: BatchNorm) -> None:
    if conv.weight.is_meta:  # the skeleton of a saved model: only its parameters are needed, not their values
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=conv.weight.dtype, device="meta"))
        return
    assert norm.running_mean is not None  # `_foldable` asks for statistics
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight, bias
