"""Activation layers: an elementwise activation becomes k of them, each on a chunk of the features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from splitquant_plugins.config import SplitConfig


@hookimpl
def splitquant_prepare_model(model: nn.Module, config: SplitConfig) -> list[str]:
    """Split the activation layers, where the option asks for it."""
    if not config.activations:
        return []
    from splitquant_plugins.passes.split_activations import split_activations

    return split_activations(model, config)
