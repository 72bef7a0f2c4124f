"""BatchNorm folding: a convolution absorbs the BatchNorm behind it, so that backends see one layer to split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitquant_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from splitquant_plugins.config import SplitConfig


@hookimpl
def splitquant_prepare_model(model: nn.Module, config: SplitConfig) -> list[str]:
    """Fold every BatchNorm that directly follows a convolution, unless the option is off."""
    if not config.fold_batchnorm:
        return []
    from splitquant_plugins.passes.fold_batchnorm import fold_batchnorms

    return fold_batchnorms(model)
