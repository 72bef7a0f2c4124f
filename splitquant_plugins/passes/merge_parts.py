"""Running a split model on a host that has no use for the parts: one matrix product per layer.

A split layer costs k products. Where the parts are dequantized before they are multiplied, as weight-only
backends do on a CPU or GPU, Σ (Pᵢ x) = (Σ Pᵢ) x saves k - 1 of them.
"""

from __future__ import annotations

from torch import nn

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.modules import Fusion, SplitModule

MODES = ("materialised", "rebuilt")


def fuse(model: nn.Module, mode: Fusion = "materialised") -> nn.Module:
    """Let every split layer run with the sum of its dequantized parts, and return the model.

    `materialised` keeps the sum in memory, in full precision beside the parts: fastest. `rebuilt` makes it
    anew at each call: no memory, less speed. The parts stay what they are, are saved as before, and the sum
    never is; `unfuse` takes it back. Outputs are the same within rounding. A part that is changed, in place or by
    another tensor, is seen, but not a write that torch does not count, into the memory of `.data` or of an inference
    tensor, or by numpy: call `model.eval()` after it, which has the sums made anew.

    Where gradients of the parts are asked for, the sum is made at each call, so run inference under `torch.no_grad()`.
    So it is in what torch.compile and torch.export make of the model, which cannot see that a part was written into. A
    layer whose parts have hooks, modules within them, such as LoRA's adapters, or a forward of their own runs part by
    part.

    Raises ConfigError for an unknown mode, InputError for a model that has no split layer, is in training
    mode, or quantizes the parts' activations, which a single product would skip.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose from {', '.join(MODES)}")
    splits = _splits(model)
    if not splits:
        raise InputError(f"{type(model).__name__} has no split layer to fuse")
    for name, split in splits.items():
        if split.training:
            raise InputError(f"{name or 'the model'} is in training mode; call model.eval() before fusing")
        for part in split.parts():
            if getattr(part, "activation_qtype", None) is not None:
                raise InputError(f"{name} has parts with quantized activations, which a fused layer would skip")
    for split in splits.values():
        split.forget_fused()
        split.fusion = mode
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Let every split layer run part by part again, and return the model."""
    for split in _splits(model).values():
        split.forget_fused()
        split.fusion = None
    return model


def _splits(model: nn.Module) -> dict[str, SplitModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitModule)}
