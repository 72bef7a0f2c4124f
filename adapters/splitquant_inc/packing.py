"""How INC packs a quantized layer: what JSON has to say so that an empty one can be made for its tensors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQLinear
from neural_compressor.torch.algorithms.weight_only.hqq.qtensor import QTensor, QTensorMetaInfo
from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from splitquant_plugins.errors import InputError, SkeletonMismatchError, first_line

Size = Annotated[int, Field(ge=1)]
Dtype = Literal["float16", "bfloat16", "float32", "int8", "int16", "int32", "int64"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PackedInc(_Strict):
    """An INCWeightOnlyLinear: the arguments it was made with."""

    kind: Literal["inc"] = "inc"
    in_features: Size
    out_features: Size
    dtype: str
    bits: Annotated[int, Field(ge=1, le=8)]
    group_size: Size
    zp: bool
    bias: bool
    g_idx: bool
    use_optimum_format: bool
    scale_dtype: Dtype
    compression_dtype: Dtype
    compression_dim: Literal[0, 1]


class PackedTensor(_Strict):
    """One of HQQ's tensors; its scale and zero point may be quantized themselves."""

    nbits: Annotated[int, Field(ge=2, le=8)]
    group_size: Size | None
    shape: tuple[Size, ...]
    axis: Literal[0, 1]
    packing: bool
    scale: PackedTensor | None = None
    zero: PackedTensor | None = None

    def tensor(self, tensors: dict[str, Tensor], prefix: str = "") -> Any:
        """Return INC's QTensor from the tensors of its parts."""
        nested = {
            part: packed.tensor(tensors, f"{prefix}{part}.") if packed else tensors[f"{prefix}{part}"]
            for part, packed in (("scale", self.scale), ("zero", self.zero))
        }
        meta = QTensorMetaInfo(self.nbits, self.group_size, torch.Size(self.shape), self.axis, self.packing)
        return QTensor(tensors[f"{prefix}val"], nested["scale"], nested["zero"], meta)


class PackedHqq(_Strict):
    """An HQQLinear."""

    kind: Literal["hqq"] = "hqq"
    in_features: Size
    out_features: Size
    bias: bool
    weight: PackedTensor

    def module(self, tensors: dict[str, Tensor], where: str) -> nn.Module:
        """Make the layer; SkeletonMismatchError where a tensor is missing."""
        made = HQQLinear(self.in_features, self.out_features, bias=self.bias, device="meta")
        made.weight = None
        try:
            made.q_weight = self.weight.tensor(tensors)
            if self.bias:
                made.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        except KeyError as error:
            raise SkeletonMismatchError(f"{where} has no tensor {error}") from None
        made.quantized = True
        return made


AnyPacked = Annotated[PackedInc | PackedHqq, Field(discriminator="kind")]


class Storage(_Strict):
    """What is needed beside the tensors; `same_as` names tensors that share another's memory."""

    format: Literal[1] = 1
    backend: Literal["inc"] = "inc"
    layers: dict[str, AnyPacked]
    same_as: dict[str, str] = {}


def packed_layer(module: Any) -> tuple[PackedInc | PackedHqq, dict[str, Tensor]]:
    """Return how a quantized module is packed, and its tensors by their names within it."""
    if isinstance(module, HQQLinear):
        packed, tensors = _packed_tensor(module.q_weight)
        if module.bias is not None:
            tensors["bias"] = module.bias
        has_bias = module.bias is not None
        return PackedHqq(
            in_features=module.in_features, out_features=module.out_features, bias=has_bias, weight=packed
        ), tensors
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if module.bias is not None:  # a buffer, or the float layer's parameter where its type was right
        buffers["bias"] = module.bias.detach().to(module.float_type, copy=True)
    same = ("in_features", "out_features", "dtype", "bits", "group_size", "use_optimum_format", "compression_dim")
    options: dict[str, Any] = {name: getattr(module, name) for name in same}
    options |= {
        name: str(getattr(module, name)).removeprefix("torch.") for name in ("scale_dtype", "compression_dtype")
    }
    held = {option: name in buffers for option, name in (("zp", "qzeros"), ("bias", "bias"), ("g_idx", "g_idx"))}
    return PackedInc(**options, **held), buffers


def rtn_layer(in_features: int, out_features: int, bits: int, group_size: int | None) -> PackedInc:
    """Say how RTN packs a layer; `group_size` None is one group per output."""
    return PackedInc(
        in_features=in_features,
        out_features=out_features,
        dtype="int",
        bits=bits,
        group_size=in_features if group_size is None else group_size,
        zp=True,
        bias=True,
        g_idx=False,
        use_optimum_format=True,
        scale_dtype="float32",
        compression_dtype="int32",
        compression_dim=1,
    )


def empty_module(layer: PackedInc) -> nn.Module:
    """Make the module whose buffers are to be filled."""
    options = layer.model_dump(exclude={"kind"})
    for key in ("scale_dtype", "compression_dtype"):
        options[key] = getattr(torch, options[key])
    try:
        made: nn.Module = INCWeightOnlyLinear(**options)
    except Exception as error:  # whatever INC makes of options that do not fit together
        raise InputError(
            f"a layer is packed in a way that INC does not know: {type(error).__name__} {first_line(error)[:80]}"
        ) from None
    return made


def _packed_tensor(stored: Any) -> tuple[PackedTensor, dict[str, Tensor]]:
    tensors = {"val": stored.val}
    nested: dict[str, PackedTensor] = {}
    for part in ("scale", "zero"):
        inner = getattr(stored, part)
        if isinstance(inner, Tensor):
            tensors[part] = inner
            continue
        nested[part], below = _packed_tensor(inner)
        tensors.update({f"{part}.{key}": value for key, value in below.items()})
    meta = stored.meta_info
    packed = PackedTensor(
        nbits=meta.nbits,
        group_size=meta.group_size,
        shape=tuple(meta.shape),
        axis=meta.axis,
        packing=bool(meta.packing),
        **nested,
    )
    return packed, tensors
