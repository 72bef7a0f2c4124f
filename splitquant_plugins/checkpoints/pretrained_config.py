"""What a split transformers model says of itself in its configuration, so that what it saves comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitquant_plugins.checkpoints.files import read_json

if TYPE_CHECKING:
    from torch import nn

# The name of the package: where it was not imported, transformers prints that it does not know the method.
METHOD = "splitquant_plugins"


def describe_to_transformers(model: nn.Module, manifest: Any) -> None:
    """Make a transformers model's `save_pretrained` write what `from_pretrained` can read; other models are left alone.

    `manifest` is kept as it is, and read whenever the configuration is written.
    """
    registry: Any = sys.modules.get("transformers.quantizers.auto")
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if registry is None or base is None or not isinstance(model, base):
        return
    made: Any = model
    described = registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](manifest=manifest)
    made.config.quantization_config = described
    made.hf_quantizer = registry.AUTO_QUANTIZER_MAPPING[METHOD](described, pre_quantized=True)


def saves_itself(model: nn.Module) -> bool:
    """Whether a model's `save_pretrained` writes what `from_pretrained` reads as the split model that it is."""
    described = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return bool(getattr(described, "quant_method", None) == METHOD)


def is_pretrained(folder: Path) -> bool:
    """Whether a folder was written by a split model's `save_pretrained`."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else {}
    described = content.get("quantization_config") if isinstance(content, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == METHOD


def plain_configuration(config: Any) -> dict[str, Any]:
    """Return a transformers configuration as JSON takes it.

    What is said in it of a split is left out, and where on this machine the float model was.
    """
    return {key: _without_origin(value) for key, value in config.to_dict().items() if key not in NOT_KEPT}


NOT_KEPT = ("quantization_config", "_name_or_path")


def _without_origin(value: Any) -> Any:
    """Leave it out of the configurations within a configuration, too."""
    if isinstance(value, dict):
        return {key: _without_origin(inner) for key, inner in value.items() if key != "_name_or_path"}
    return value
