"""Building a split module, and putting it in the places of the layer that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from splitquant_plugins.modules import SplitModule
from splitquant_plugins.passes.module_tree import replace_module
from splitquant_plugins.plan import LayerPlan
from splitquant_plugins.plugins import Plugins


def build_split(
    plugins: Plugins, module: nn.Module, parts: Mapping[str, Sequence[Tensor | None]], plan: LayerPlan
) -> SplitModule:
    """Have the split module of a layer built, in its mode; plugins hear of backends that replace its parts."""
    split = plugins.build_module(module, parts, plan)
    split.train(module.training)
    split.notify(plugins.part_replaced)
    return split


def replace_everywhere(model: nn.Module, names: Sequence[str], split: nn.Module | None) -> nn.Module:
    """Put a module in all the places of a layer; return the model, which is that module if the model was the layer."""
    assert split is not None
    for name in names:
        if name:
            replace_module(model, name, split)
        else:
            model = split
    return model
