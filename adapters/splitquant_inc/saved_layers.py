"""INC's weight-only layers in transformers' `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from splitquant_inc.grid import WORD_BITS
from splitquant_inc.packing import AnyPacked, PackedHqq, PackedInc, Storage, empty_module
from splitquant_inc.storage import STORAGE_FILE, refuse_misfit, state_of
from splitquant_plugins.checkpoints.files import read_described
from splitquant_plugins.checkpoints.saved_layers import PartCodes, SavedLayers
from splitquant_plugins.errors import InputError, SkeletonMismatchError


class IncLayers(SavedLayers):
    """Packed codes, scales and zero points, of RTN, GPTQ and HQQ, and how they are packed."""

    def describe(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return how INC has packed each layer."""
        return {name: layer.model_dump() for name, layer in state_of(model)[1].items()}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors as they were packed; forward passes widen some in place."""
        return state_of(model)[0]

    def make(self, layer: nn.Module, described: Mapping[str, Any], tensors: dict[str, Tensor], name: str) -> nn.Module:
        """Make an INC layer."""
        packed = _packed(described, name)
        refuse_misfit(layer, name, packed, "config.json")
        if isinstance(packed, PackedHqq):
            return packed.module(tensors, name)
        made = empty_module(packed)
        try:
            made.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise SkeletonMismatchError(f"{name} was packed in another way: {' '.join(str(error).split())}") from None
        return made

    def described_in(self, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return how layers are packed, as `splitquant_inc.load` reads it."""
        storage = read_described(folder / STORAGE_FILE, Storage)
        return {name: layer.model_dump() for name, layer in storage.layers.items()}, storage.same_as

    def part_codes(self, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PartCodes | None:
        """Unpack codes [in, out] and zero points of RTN and GPTQ in the format of optimum; HQQ's zeros are no codes."""
        packed = _packed(described)
        if not isinstance(packed, PackedInc) or not (packed.zp and packed.use_optimum_format) or packed.g_idx:
            return None
        if packed.dtype != "int" or packed.compression_dtype != "int32" or WORD_BITS % packed.bits:
            return None
        rest = {key: tensor for key, tensor in tensors.items() if key != "qweight"}
        codes = _numbers(tensors["qweight"], packed.bits, packed.in_features)
        return PartCodes(codes, self.zero_codes(described, rest), packed.bits, rest)

    def zero_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor]) -> Tensor:
        """Return zero points [in, out]; one less is stored, as the format of GPTQ has it."""
        packed = _packed(described)
        stored = _numbers(rest["qzeros"].t(), packed.bits, packed.out_features).t()
        zeros = (stored + 1) & (2**packed.bits - 1)
        return zeros.repeat_interleave(packed.group_size, dim=0)[: packed.in_features]

    def with_codes(self, described: Mapping[str, Any], rest: Mapping[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
        """Pack codes into words, lowest bits first."""
        bits = _packed(described).bits
        per_word = WORD_BITS // bits
        words = torch.zeros(-(-len(codes) // per_word), codes.shape[1], dtype=torch.int32, device=codes.device)
        for lane in range(per_word):
            rows = codes[lane::per_word].to(torch.int32)
            words[: len(rows)] |= rows << (bits * lane)
        return {"qweight": words}


def _packed(described: Mapping[str, Any], name: str = "of INC") -> Any:
    try:
        return TypeAdapter(AnyPacked).validate_python(dict(described))
    except ValidationError as error:
        raise InputError(f"config.json is damaged: layer {name} {error.errors()[0]['msg']}") from None


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack words [⌈count / per word⌉, n] into bytes [count, n]."""
    lanes = [(words >> (bits * lane)) & (2**bits - 1) for lane in range(WORD_BITS // bits)]
    return torch.stack(lanes, dim=1).flatten(0, 1)[:count].to(torch.uint8)
