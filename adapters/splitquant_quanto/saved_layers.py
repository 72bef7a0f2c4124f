"""quanto's layers in transformers' `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from optimum.quanto import quantization_map
from optimum.quanto.nn import QModuleMixin, quantize_module
from torch import Tensor, nn

from splitquant_plugins.checkpoints.headers import TensorSpec
from splitquant_plugins.checkpoints.saved_layers import PartCodes, SavedLayers
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_quanto.quantization import LAYERS
from splitquant_quanto.storage import read_description, saved_tensors, validated_entry


class QuantoLayers(SavedLayers):
    """Codes, scales and shifts, as quanto's own state has them, and the type of a layer's weights."""

    def describe(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return quanto's map of its layers; they have to be frozen."""
        found: dict[str, dict[str, Any]] = quantization_map(model)
        for name, entry in found.items():
            validated_entry(entry, name)
            if not model.get_submodule(name).frozen:
                raise InputError(f"{name} is not frozen; call optimum.quanto.freeze(model) before saving")
        return found

    def make(self, layer: nn.Module, described: Mapping[str, Any], tensors: dict[str, Tensor], name: str) -> nn.Module:
        """Make a quanto layer; its tensors must be those that quanto saves for a layer of that shape."""
        weights = validated_entry(described, name)["weights"]
        if not isinstance(layer, LAYERS):
            raise SkeletonMismatchError(f"quanto is to quantize {name}, which is a {type(layer).__name__}")
        weight = layer.weight
        bits = int(weights.removeprefix("qint"))
        found = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        expected = [saved_tensors(weight.shape, weight.dtype, bits, part=part) for part in (True, False)]
        if layer.bias is not None:
            for specs in expected:
                specs["bias"] = TensorSpec(layer.bias.dtype, tuple(layer.bias.shape))
        if found not in expected:
            wrong = sorted(key for key in found.keys() | expected[0].keys() if found.get(key) != expected[0].get(key))
            raise SkeletonMismatchError(
                f"{name}: {wrong[0]} is saved as {found.get(wrong[0])}, and {expected[0].get(wrong[0])} is what quanto "
                f"has for a {type(layer).__name__} of {tuple(weight.shape)} at {weights}"
            )
        made = cast(QModuleMixin, quantize_module(layer, weights=weights))
        made.load_state_dict(tensors, strict=False, assign=True)
        if not made.frozen:
            raise SkeletonMismatchError(f"{name}: quanto did not take the codes that were saved")
        return cast(nn.Module, made)

    def described_in(self, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return quanto's map, as `splitquant_quanto.load` reads it."""
        qmap, same_as = read_description(folder)
        return {name: dict(entry) for name, entry in qmap.items()}, same_as

    def part_codes(self, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PartCodes | None:
        """Unpack the codes: those of rows r, r + height and so on share a byte, the first in its lowest bits."""
        bits, name = _bits(described), _codes_name(described)
        data, rest = tensors[name], {key: tensor for key, tensor in tensors.items() if key != name}
        if bits == _BYTE:
            return PartCodes(data.view(torch.uint8), self.zero_codes(described, rest), bits, rest)
        lanes = [(data >> (bits * lane)) & (2**bits - 1) for lane in range(_BYTE // bits)]
        codes = torch.cat(lanes)[: len(rest["weight._scale"])]
        return PartCodes(codes, self.zero_codes(described, rest), bits, rest)

    def zero_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor]) -> Tensor:
        """Return the shift in steps, which is whole on the parts of a split layer; 0 where there is no shift."""
        bits, scale = _bits(described), rest["weight._scale"]
        if bits == _BYTE:
            return torch.zeros((), dtype=torch.uint8, device=scale.device)
        steps = (rest["weight._shift"].double() / scale.double()).round().nan_to_num()
        return steps.clamp(0, 2**bits - 1).to(torch.uint8)

    def with_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
        """Pack the codes."""
        bits = _bits(described)
        if bits == _BYTE:
            return {_codes_name(described): codes.view(torch.int8)}
        height = -(-len(codes) * bits // _BYTE)
        data = torch.zeros((height, *codes.shape[1:]), dtype=torch.uint8, device=codes.device)
        for lane in range(_BYTE // bits):
            rows = codes[lane * height : (lane + 1) * height]
            data[: len(rows)] |= rows << (bits * lane)
        return {_codes_name(described): data}


_BYTE = 8


def _bits(described: Mapping[str, Any]) -> int:
    return int(validated_entry(described, "a quanto layer")["weights"].removeprefix("qint"))


def _codes_name(described: Mapping[str, Any]) -> str:
    return "weight._data" if _bits(described) == _BYTE else "weight._data._data"
