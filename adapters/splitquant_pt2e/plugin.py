"""The hooks of the PT2E adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from splitquant_plugins.hookspecs import RegisterBackend
    from splitquant_plugins.passes.base import ModelPass

HOMES = ("torchao.quantization.pt2e.", "torch.ao.quantization.quantizer.")


@hookimpl
def splitquant_register_backends(register: RegisterBackend) -> None:
    """Register PT2E."""
    register("pt2e", "splitquant_pt2e.backend:Pt2eBackend", "PT2E (torchao), weights at INT2, INT4 and INT8")


@hookimpl
def splitquant_attach(split_pass: ModelPass, recipe: Any) -> Any | None:
    """Attach a pass to a PT2E Quantizer, of torchao or of anyone."""
    if not any(kind.__name__ == "Quantizer" and kind.__module__.startswith(HOMES) for kind in type(recipe).__mro__):
        return None
    from splitquant_pt2e.attach import attach

    return attach(split_pass, recipe)
