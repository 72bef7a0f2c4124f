"""`SplitQuantPass() + QuantoConfig(...)`: a quantization method of transformers that splits, then quantizes.

transformers swaps Linear layers for quanto's before the weights are loaded. A split needs the weights, so this
method loads the float model first, and splits, quantizes and freezes it then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import QuantoConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_quanto import QuantoHfQuantizer

import splitquant_plugins.decoupleq.decoupleq_pass
import splitquant_plugins.passes.clip
import splitquant_plugins.passes.splitquant  # noqa: F401
from splitquant_plugins.passes.base import ModelPass, pass_from_dict
from splitquant_quanto.quantization import quantize_after

METHOD = "splitquant_quanto"


class SplitQuantoConfig(QuantoConfig):
    """A QuantoConfig with a pass in front."""

    def __init__(self, weights: str = "int8", first: ModelPass | dict[str, Any] | None = None, **options: Any) -> None:
        """Take the pass itself, or what its `to_dict` returned."""
        super().__init__(weights=weights, **options)
        self.quant_method = METHOD
        self.first = first if isinstance(first, ModelPass) else pass_from_dict(first)
        _make_known()

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON takes them, those of the pass too, but for its calibration data."""
        return {**{key: value for key, value in self.__dict__.items() if key != "first"}, "first": self.first.to_dict()}

    def __eq__(self, other: object) -> bool:
        """Whether the other recipe has the same pass and the same options."""
        return isinstance(other, SplitQuantoConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _make_known()  # in the process that a pickle is loaded in


def _make_known() -> None:
    """Tell transformers of this method of quantization."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SplitQuantoConfig)
        register_quantizer(METHOD)(SplitQuantoHfQuantizer)


class SplitQuantoHfQuantizer(QuantoHfQuantizer):
    """Loads the float weights, then splits, quantizes and freezes."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        ignore = ignored_by(model, self.modules_to_not_convert or [])
        config = self.quantization_config
        return quantize_after(config.first, model, config.weights, ignore=ignore, kinds=(nn.Linear,))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """No: everything is quantized after loading."""
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """No: the pass leaves the model with a quantizer that is, and that saves what came of this one."""
        return False


def ignored_by(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of modules that transformers' `modules_to_not_convert` excludes, by its own rules.

    A pattern matches from the start up to a dot, as text or as a regular expression, or as the end of a name.
    """

    def excluded(name: str) -> bool:
        return any(re.match(rf"(?:{p})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(p) for p in patterns)

    return [name for name, _ in model.named_modules() if name and excluded(name)]
