"""The quantization method `splitquant_plugins` of transformers: what a split model is when saved and when loaded.

Imported with transformers, and therefore light: what it takes to rebuild a model is imported when one is loaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer

from splitquant_plugins.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splitquant_plugins.checkpoints.saved_layers import SavedLayers
    from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig


class SplitCheckpointQuantizer(HfQuantizer):
    """Rebuilds split layers before transformers loads weights, and the backend's layers after."""

    quantization_config: SplitCheckpointConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise where the backend is not installed, or the device map moves packed layers about."""
        config = self.quantization_config
        if config.backend is None:
            return
        self._saved_layers()
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ConfigError(
                f"device_map={device_map!r} leaves layers on the {'disk' if 'disk' in places else 'cpu'} to be fetched "
                f"for each call, and {config.backend}'s packed layers cannot be: give devices that hold them"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that was asked for; a quantized model has the one that it was quantized in."""
        config = self.quantization_config
        saved = config.dtype and getattr(torch, config.dtype, None)
        if config.backend is not None and dtype != saved:
            raise ConfigError(
                f"dtype={dtype}: this model was quantized in {config.dtype}, and so are its scales; leave dtype out, "
                "or load the float model in that dtype and quantize it then"
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        from splitquant_plugins.pretrained.skeleton import make_skeleton

        make_skeleton(model, self.quantization_config, checkpoint_files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from splitquant_plugins.pretrained.skeleton import fill_skeleton

        backend = self.quantization_config.backend
        fill_skeleton(model, self.quantization_config, None if backend is None else self._saved_layers())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes, and bring up to date what the configuration says of it."""
        from splitquant_plugins.pretrained.state import describe_and_state, refuse_other_tensors

        # save_pretrained(state_dict=...) does not hand on what it was given, and writes what it gets from here.
        caller = sys._getframe(1)
        if caller.f_code.co_name == "save_pretrained":
            refuse_other_tensors(model, caller.f_locals.get("state_dict"))
        saved: Any = model
        self.quantization_config, state = describe_and_state(model)
        saved.config.quantization_config = self.quantization_config
        # The manifest names layers as the model does: older names of the architecture are not gone back to.
        saved._weight_conversions = []
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Float parts can be trained; packed ones cannot."""
        return self.quantization_config.backend is None

    def _saved_layers(self) -> SavedLayers:
        from splitquant_plugins.plugins import Plugins

        backend = Plugins.load().backend(str(self.quantization_config.backend))
        backend.require()
        layers: SavedLayers | None = backend.saved_layers()
        if layers is None:
            raise ConfigError(f"backend {backend.name} does not say how its layers are made of what was saved")
        return layers
