"""What config.json says of a split model, as transformers' configuration of a quantization method.

Imported with transformers, and therefore light.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from splitquant_plugins.checkpoints.pretrained_config import METHOD
from splitquant_plugins.errors import InputError

if TYPE_CHECKING:
    from splitquant_plugins.checkpoints.joined_codes import JoinedLayer
    from splitquant_plugins.manifest import Manifest

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class SplitCheckpointConfig(QuantizationConfigMixin):
    """What config.json says of a split model.

    `manifest` is the record of the split. `backend` has quantized the `layers`, parts among them: by name, what it
    has to know of each beside its tensors. `dtype` is that of the rest of the model, and of scales. `buffers` are those
    that are computed and not saved, such as rotary frequencies, where a backend has left them in another than float32.
    `joined` are the split layers whose codes are stored once for all parts; see `checkpoints/joined_codes.py`.
    """

    def __init__(
        self,
        manifest: Manifest | dict[str, Any] | None = None,
        backend: str | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        dtype: str | None = None,
        buffers: dict[str, str] | None = None,
        joined: dict[str, Any] | None = None,
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
        self.joined = _joined(joined)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON takes, the manifest as it is now."""
        manifest = json.loads(self.manifest.model_dump_json(exclude_defaults=True))
        described = {"quant_method": METHOD, "format": 1, "dtype": self.dtype, "backend": self.backend}
        buffers: dict[str, Any] = {"buffers": self.buffers} if self.buffers else {}
        joined = {name: layer.model_dump(mode="json") for name, layer in self.joined.items()}
        buffers.update({"joined": joined} if joined else {})
        return {**described, **buffers, "layers": self.layers, "manifest": manifest}

    def __eq__(self, other: object) -> bool:
        """Whether the other says the same."""
        return isinstance(other, SplitCheckpointConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _joined(given: Any) -> dict[str, JoinedLayer]:
    from pydantic import TypeAdapter, ValidationError

    from splitquant_plugins.checkpoints.joined_codes import JoinedLayer

    try:
        return TypeAdapter(dict[str, JoinedLayer]).validate_python(given or {})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"config.json: quantization_config.joined is damaged: {where} {problem['msg']}") from None


def _manifest(given: Manifest | dict[str, Any] | None) -> Manifest:
    from splitquant_plugins.manifest import Manifest, manifest_from

    return given if isinstance(given, Manifest) else manifest_from(given, "config.json: quantization_config.manifest")
