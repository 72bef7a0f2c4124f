"""What is checked before a model is touched, and of every tensor that was split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import (
    AlreadyQuantizedError,
    AlreadySplitError,
    InputError,
    SplitFailedError,
)
from splitquant_plugins.manifest import ATTRIBUTE, Manifest
from splitquant_plugins.modules import SplitActivation, SplitModule, is_tensor_subclass
from splitquant_plugins.parallel import chunks, in_threads, spans
from splitquant_plugins.parts import sum_parts
from splitquant_plugins.passes.select import Layer

QUANTIZED_PACKAGES = (
    "optimum.quanto",
    "neural_compressor.",
    "torchao.",
    "bitsandbytes.",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
)
# Wrappers that hold on to the parameters that a model had when it was wrapped.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_unfit_model(model: object) -> None:
    """Raise unless this is a float model that was never split."""
    if isinstance(model, torch.export.ExportedProgram) or (
        isinstance(model, torch.fx.GraphModule)
        and not any(isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) for module in model.modules())
    ):
        raise InputError(
            "an exported graph has no layer modules to split; attach the pass to the PT2E quantizer instead: "
            "SplitQuantPass() + quantizer"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"SplitQuantPass takes a torch.nn.Module, not a {type(model).__name__}")
    manifest = getattr(model, ATTRIBUTE, None)
    if isinstance(manifest, Manifest) and manifest.values is not None and not manifest.split:
        raise AlreadySplitError(
            "DecoupleQPass was applied to this model, and SplitQuantPass goes first: load the model afresh and write "
            "SplitQuantPass(...) + DecoupleQPass(...)"
        )
    if manifest is not None:
        raise AlreadySplitError("the model was split before; load it afresh to split it with other options")
    for name, module in model.named_modules():
        if isinstance(module, (SplitModule, SplitActivation)):
            raise AlreadySplitError(f"{name or 'the model'} was split before; load the model afresh")
    refuse_quantized_model(model)
    refuse_unfit_modules(model)


def refuse_unfit_modules(model: nn.Module) -> None:
    """Raise where a module keeps, or writes into, the weights of others that a pass replaces."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise InputError(
                f"{name or 'the model'} is a {kind}, which goes on synchronising the parameters that the layers had: "
                "give its .module, and wrap the model after the split"
            )
        config = getattr(module, "config", None)
        if kind == "RwkvModel" and getattr(config, "rescale_every", 0) > 0:
            raise InputError(
                f"{name or 'the model'} divides the weights of its layers in place in evaluation mode, and a split "
                "layer has no single one: set model.config.rescale_every = 0 first, which is meant for float16 alone"
            )


def refuse_quantized_model(model: nn.Module) -> None:
    """Raise where a backend has quantized any layer of the model."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTIZED_PACKAGES):
            raise AlreadyQuantizedError(
                f"{name or 'the model'} is a quantized {type(module).__qualname__}; split first, then quantize"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if is_tensor_subclass(parameter):
                raise AlreadyQuantizedError(
                    f"{name}.{key} is a {type(parameter.data).__name__}; split first, then quantize"
                )


def refuse_unfit_weights(layers: Sequence[Layer]) -> None:
    """Raise, naming the layer, where a weight or bias is not a finite float tensor that is in memory."""
    for layer in layers:
        for role, tensor in (("weight", layer.plan.weight), ("bias", layer.plan.bias)):
            if tensor is None:
                continue
            where = f"{layer.name}.{role}"
            if tensor.dtype not in DTYPES:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise InputError(f"{where} is {tensor.dtype}; a split takes {allowed}")
            if tensor.is_meta:
                raise InputError(f"{where} is on the meta device; load the model's weights first")
            # NaN and infinity reach the sum, which takes one pass and no memory; a finite overflow needs the second.
            if not bool(torch.isfinite(tensor.sum())) and (count := int((~torch.isfinite(tensor)).sum())):
                raise SplitFailedError(f"{where} has {count} NaN or infinite values; repair the checkpoint")


def refuse_unfit_values(name: str, tensor: Tensor) -> None:
    """Raise SplitFailedError where a tensor of a checkpoint holds NaN or infinity."""
    # Extremes are finite where all values are, and need no second tensor.
    if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise SplitFailedError(f"{name} has {count} NaN or infinite values; repair the checkpoint")


def check_parts(where: str, tensor: Tensor, parts: Sequence[Tensor], k: int) -> None:
    """Raise SplitFailedError unless 1 to k parts of the tensor's shape, dtype and device sum to it."""
    refuse_malformed_parts(where, tensor, parts, k)
    refuse_wrong_sum(where, tensor, parts)


def refuse_malformed_parts(where: str, tensor: Tensor, parts: Sequence[Tensor], k: int) -> None:
    """Raise SplitFailedError unless there are 1 to k parts of the tensor's shape, dtype and device."""
    if not 1 <= len(parts) <= k:
        raise SplitFailedError(f"{where}: the splitter made {len(parts)} parts of k = {k}")
    for part in parts:
        if (part.shape, part.dtype, part.device) != (tensor.shape, tensor.dtype, tensor.device):
            raise SplitFailedError(
                f"{where}: a part is {tuple(part.shape)} {part.dtype} on {part.device}, "
                f"not {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def refuse_wrong_sum(where: str, tensor: Tensor, parts: Sequence[Tensor]) -> None:
    """Raise SplitFailedError unless the parts sum to the tensor.

    The sum is exact where the parts have disjoint support. Elsewhere each value may be off by the rounding of
    k - 1 additions, k - 1 units in the last place of the largest part at that place.
    """
    if not _sums_close(tensor, parts):
        error = (sum_parts(parts) - tensor).abs()
        raise SplitFailedError(f"{where}: the parts miss the tensor by up to {float(error.max()):.3g}")


def _sums_close(tensor: Tensor, parts: Sequence[Tensor]) -> bool:
    if tensor.device.type != "cpu" or not all(each.is_contiguous() for each in (tensor, *parts)):
        return _sum_is_close(tensor, parts)
    flat = tensor.reshape(-1)
    pieces = [part.reshape(-1) for part in parts]

    def close(span: slice) -> bool:
        return all(_sum_is_close(flat[chunk], [piece[chunk] for piece in pieces]) for chunk in chunks(span))

    return all(in_threads(close, spans(flat.numel())))


def _sum_is_close(tensor: Tensor, parts: Sequence[Tensor]) -> bool:
    total = sum_parts(parts)
    if torch.equal(total, tensor):
        return True
    largest = parts[0].abs()
    for part in parts[1:]:
        largest = torch.maximum(largest, part.abs())
    allowed = largest.mul_(torch.finfo(tensor.dtype).eps * max(len(parts) - 1, 0))
    return bool(((total - tensor).abs() <= allowed).all())
