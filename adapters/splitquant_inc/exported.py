"""W8A8 through INC's export path: StaticQuantConfig and DynamicQuantConfig behind a pass."""

from __future__ import annotations

import importlib
from typing import Any

from neural_compressor.torch.quantization import DynamicQuantConfig
from torch import nn
from torch.fx import GraphModule

from splitquant_inc.recipe import PassFirst
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.splitquant import SplitQuantPass

GRAPH_SPLIT = "splitquant_pt2e.recipe"
EXPORT_SPLIT = "export(SplitQuantPass()(model), example_inputs=...), then prepare with the configuration alone"


class ExportedRecipe(PassFirst):
    """Splits the layers of a graph that `neural_compressor.torch.export.export` made."""

    def get_model_info(self, model: nn.Module, example_inputs: Any = None) -> Any:
        """Run the pass on the graph, unless `prepare` did."""
        if not getattr(model, "is_prepared", False):
            self._run_pass(model)
        return super().get_model_info(model=model, example_inputs=example_inputs)  # type: ignore[misc]

    def _run_pass(self, model: nn.Module) -> None:
        if not isinstance(model, GraphModule):
            raise InputError(
                f"{type(self).plain.__name__} quantizes an exported graph, and this is a {type(model).__name__}: "
                "call neural_compressor.torch.export.export(model, example_inputs=...) first"
            )
        try:
            split_ahead = importlib.import_module(GRAPH_SPLIT).split_ahead
        except ImportError as error:
            raise ConfigError(
                f"splitting an exported graph needs the pt2e adapter ({error}); or split before: {EXPORT_SPLIT}"
            ) from None
        if not isinstance(self.first, SplitQuantPass):
            raise ConfigError(f"{type(self.first).__name__} does not work on an exported graph: {EXPORT_SPLIT}")
        split_ahead(model, self.first, quantizer_of(self))


def quantizer_of(config: Any) -> Any:
    """Return the quantizer that INC will make of the configuration, layer options included."""
    from neural_compressor.torch.algorithms.pt2e_quant.utility import create_xiq_quantizer_from_pt2e_config

    return create_xiq_quantizer_from_pt2e_config(config, is_dynamic=isinstance(config, DynamicQuantConfig))
