"""The quantization method `splitquant_plugins` of transformers: what a split model is when saved and when loaded.

Imported with transformers, and therefore light: what it takes to rebuild a model is imported when one is loaded.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from splitquant_plugins.checkpoints.pretrained_config import METHOD
from splitquant_plugins.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from splitquant_plugins.checkpoints.saved_layers import SavedLayers
    from splitquant_plugins.manifest import Manifest

_FLOATS = ("float16", "bfloat16", "float32", "float64")

__all__ = ["METHOD", "SplitCheckpointConfig", "SplitCheckpointQuantizer"]


class SplitCheckpointConfig(QuantizationConfigMixin):
    """What config.json says of a split model.

    `manifest` is the record of the split. `backend` has quantized the `layers`, parts among them: by name, what it
    has to know of each beside its tensors. `dtype` is that of the rest of the model, and of scales. `buffers` are those
    that are computed and not saved, such as rotary frequencies, where a backend has left them in another than float32.
    """

    def __init__(
        self,
        manifest: Manifest | dict[str, Any] | None = None,
        backend: str | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        dtype: str | None = None,
        buffers: dict[str, str] | None = None,
        format: int = 1,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format != 1 or unknown or quant_method != METHOD:
            what = f"format {format}" if format != 1 else ", ".join(sorted(unknown)) or quant_method
            raise InputError(f"config.json: quantization_config is not of this version of splitquant_plugins: {what}")
        if not isinstance(layers or {}, dict) or not all(isinstance(each, dict) for each in (layers or {}).values()):
            raise InputError("config.json: quantization_config.layers is no object of objects")
        if not isinstance(buffers or {}, dict) or not set((buffers or {}).values()) <= set(_FLOATS):
            raise InputError(f"config.json: quantization_config.buffers: a dtype is none of {', '.join(_FLOATS)}")
        if bool(layers) != (backend is not None):
            raise InputError("config.json: quantization_config has layers without a backend, or a backend without any")
        super().__init__(quant_method=METHOD)
        self.manifest = _manifest(manifest)
        self.backend = backend
        self.layers = layers or {}
        self.dtype = dtype
        self.buffers = buffers or {}

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON takes, the manifest as it is now."""
        manifest = json.loads(self.manifest.model_dump_json(exclude_defaults=True))
        described = {"quant_method": METHOD, "format": 1, "dtype": self.dtype, "backend": self.backend}
        buffers = {"buffers": self.buffers} if self.buffers else {}
        return {**described, **buffers, "layers": self.layers, "manifest": manifest}

    def __eq__(self, other: object) -> bool:
        """Whether the other says the same."""
        return isinstance(other, SplitCheckpointConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


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
        from splitquant_plugins.pretrained.state import describe_and_state

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


def _manifest(given: Manifest | dict[str, Any] | None) -> Manifest:
    from pydantic import ValidationError

    from splitquant_plugins.manifest import Manifest

    if isinstance(given, Manifest):
        return given
    try:
        return Manifest.model_validate_json(json.dumps(given))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"config.json: quantization_config.manifest is damaged or of another version: {where} {problem['msg']}"
        ) from None
