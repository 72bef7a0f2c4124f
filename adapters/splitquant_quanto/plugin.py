"""The hooks of the quanto adapter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitquant_plugins.hookspecs import hookimpl
from splitquant_plugins.pretrained.when_imported import when_imported

if TYPE_CHECKING:
    from torch import nn

    from splitquant_plugins.hookspecs import RegisterBackend
    from splitquant_plugins.modules import SplitModule
    from splitquant_plugins.passes.base import ModelPass


@hookimpl
def splitquant_register_backends(register: RegisterBackend) -> None:
    """Register quanto."""
    register("quanto", "splitquant_quanto.backend:QuantoBackend", "optimum-quanto, weights at INT2, INT4 and INT8")
    when_imported("optimum.quanto", lambda: import_module("splitquant_quanto.patterns"))


@hookimpl
def splitquant_attach(split_pass: ModelPass, recipe: Any) -> Any | None:
    """Attach a pass to transformers' QuantoConfig."""
    kinds = [kind.__name__ for kind in type(recipe).__mro__ if kind.__module__.startswith("transformers.")]
    if "QuantoConfig" not in kinds:
        return None
    from splitquant_quanto.backend import QuantoBackend

    QuantoBackend().require()
    from splitquant_quanto.attach import attach

    return attach(split_pass, recipe)


@hookimpl
def splitquant_part_replaced(split: SplitModule, part: str, module: nn.Module) -> None:
    """Make quanto's grid of a part represent 0 exactly, as the zeros injected by a split need it."""
    if type(module).__module__.startswith("optimum.quanto."):
        from splitquant_quanto.optimizer import make_zero_exact
        from splitquant_quanto.patterns import refuse_patterns_that_miss_parts

        refuse_patterns_that_miss_parts()
        make_zero_exact(module)
