"""What is done to a model before its layers are selected: BatchNorms folded, activations split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from splitquant_plugins.config import SplitConfig


@hookimpl
def splitquant_prepare_model(model: nn.Module, config: SplitConfig) -> list[str]:
    """Fold BatchNorms into the convolutions before them, and split activations, where the options ask for it."""
    from splitquant_plugins.passes.fold_batchnorm import fold_batchnorms
    from splitquant_plugins.passes.split_activations import split_activations

    folded = fold_batchnorms(model) if config.fold_batchnorm else []
    return [*(split_activations(model, config) if config.activations else []), *folded]
