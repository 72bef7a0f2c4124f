"""The hooks of the adapter for Intel Neural Compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from splitquant_plugins.hookspecs import RegisterBackend
    from splitquant_plugins.passes.base import ModelPass


@hookimpl
def splitquant_register_backends(register: RegisterBackend) -> None:
    """Register Intel Neural Compressor."""
    register("inc", "splitquant_inc.backend:IncBackend", "Intel Neural Compressor, RTN weights at INT2, INT4 and INT8")


@hookimpl
def splitquant_attach(split_pass: ModelPass, recipe: Any) -> Any | None:
    """Attach a pass to a configuration of neural_compressor."""
    if not any(kind.__module__.startswith("neural_compressor.") for kind in type(recipe).__mro__):
        return None
    from splitquant_inc.attach import attach

    return attach(split_pass, recipe)
