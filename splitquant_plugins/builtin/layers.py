"""The layer types that ship with the package: Linear, Conv1d/2d/3d and transformers' Conv1D."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from splitquant_plugins.config import SplitConfig
    from splitquant_plugins.grid import Granularity
    from splitquant_plugins.modules import SplitModule
    from splitquant_plugins.plan import LayerPlan, Skip


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What a class may define that neither changes what its layers compute nor can be asked for by a parent.
HARMLESS = (
    *("__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__"),
    *("__annotations_cache__", "__dict__", "__weakref__", "__static_attributes__", "__firstlineno__"),
    *("__orig_bases__", "__parameters__", "__init__", "__repr__", "extra_repr", "reset_parameters"),
)


@hookimpl(trylast=True)
def splitquant_select_layer(name: str, module: nn.Module, config: SplitConfig) -> LayerPlan | Skip | None:
    """Select Linear and convolution layers; say why not for their parametrized or specialised kin."""
    from torch import nn

    from splitquant_plugins.passes.module_tree import is_transformers_conv1d
    from splitquant_plugins.plan import LayerPlan, Skip

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Skip("transposed convolutions are not supported")
    if isinstance(module, nn.MultiheadAttention):
        return Skip("nn.MultiheadAttention keeps its weights as parameters of its own; split an exported graph")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Skip("nn.MultiheadAttention applies this weight itself; split an exported graph instead")
    is_hugging_face = is_transformers_conv1d(module)
    if not isinstance(module, (nn.Linear, *convolutions)) and not is_hugging_face:
        return None
    for role in ("weight", "bias"):
        if role not in module._parameters:
            return Skip(f"its {role} is parametrized (weight norm or the like); remove the parametrization first")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return Skip("it has no weight yet; run a batch through the model first")
    own = own_definitions(type(module), _plain_type(module)) + own_members(module)
    if own:
        return Skip(f"{type(module).__qualname__} has a {_listed(own)} of its own; a plugin can add its layer type")
    if any(getattr(module, table) for table in HOOKS):
        return Skip("it has forward or backward hooks, which would be lost; remove them first")
    weight = module._parameters["weight"]
    assert weight is not None  # the guards above leave only layers that own their weight
    if is_hugging_face:
        return LayerPlan("conv1d_hf", weight.t(), module._parameters["bias"], _granularity(config, "tensor"))
    bias = module._parameters["bias"]
    if isinstance(module, nn.Linear):
        return LayerPlan("linear", weight, bias, _granularity(config, "tensor"))
    assert isinstance(module, convolutions)
    kind = f"conv{len(module.kernel_size)}d"
    return LayerPlan(kind, weight, bias, _granularity(config, "channel"), groups=module.groups)


@hookimpl(trylast=True)
def splitquant_build_module(
    module: nn.Module, parts: Mapping[str, Sequence[Tensor | None]], plan: LayerPlan
) -> SplitModule | None:
    """Build the split module of one of the kinds above."""
    from splitquant_plugins import modules

    kinds = {"conv1d": modules.SplitConv1d, "conv2d": modules.SplitConv2d, "conv3d": modules.SplitConv3d}
    if plan.kind not in ("linear", "conv1d_hf", *kinds):
        return None
    layers = [_part(module, plan.kind, w, b) for w, b in zip(parts["weight"], parts["bias"], strict=True)]
    if plan.kind in ("linear", "conv1d_hf"):
        split: SplitModule = modules.SplitLinear(layers, transposed=plan.kind == "conv1d_hf")
    else:
        split = kinds[plan.kind](layers)
    for name, value in vars(module).items():  # what a parent may have noted on the layer, and may read again
        if name not in vars(split) and not hasattr(type(split), name):
            setattr(split, name, value)
    return split


def own_definitions(kind: type, plain: type) -> list[str]:
    """Return what a subclass, or a class mixed into it, defines beyond the plain class: methods and attributes."""
    added = [each for each in kind.__mro__ if each not in plain.__mro__]
    return [name for each in added for name in vars(each) if name not in HARMLESS]


def own_members(module: nn.Module) -> list[str]:
    """Return the functions, parameters, buffers and modules that one layer has beyond weight and bias."""
    functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("__")]
    return [*functions, *({*module._parameters} - {"weight", "bias"}), *module._buffers, *module._modules]


def _plain_type(module: nn.Module) -> type:
    from torch import nn

    from splitquant_plugins.passes.module_tree import transformers_conv1d

    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, transformers_conv1d())
    return next(kind for kind in plain if kind is not None and isinstance(module, kind))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(dict.fromkeys(names[:3]))
    return f"{shown} and more" if len(names) > 3 else shown


def _part(module: nn.Module, kind: str, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    import torch
    from torch import nn

    from splitquant_plugins.modules import CONV_ATTRIBUTES

    assert weight is not None
    with torch.device("meta"):  # nothing is allocated for weights that are replaced at once
        if kind in ("linear", "conv1d_hf"):
            part: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            plain = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[kind]
            part = plain(**{name: getattr(module, name) for name in CONV_ATTRIBUTES}, bias=bias is not None)
    part.weight = _parameter(weight)
    if bias is not None:
        part.bias = _parameter(bias)
    return part.train(module.training)


def _parameter(tensor: Tensor) -> nn.Parameter:
    from torch import nn

    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _granularity(config: SplitConfig, automatic: Granularity) -> Granularity:
    return automatic if config.granularity == "auto" else config.granularity
