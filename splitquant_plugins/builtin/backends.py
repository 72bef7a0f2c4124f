"""The backend that ships with the core, for linear grids of any width; real ones come from adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from splitquant_plugins.hookspecs import RegisterBackend


@hookimpl
def splitquant_register_backends(register: RegisterBackend) -> None:
    """Register the simulated backend."""
    register(
        "simulated",
        "splitquant_plugins.evaluation.simulated_backend:SimulatedBackend",
        "any linear grid, by fake quantization",
    )
