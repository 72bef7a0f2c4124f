"""Which layers INC's GPTQ quantizes: those of the last stack of blocks that it finds, and the last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def layers_in_blocks(model: nn.Module) -> tuple[list[str], str | None]:
    """Names of the layers of the transformer blocks, as INC finds them, and of the module behind them."""
    from neural_compressor.torch.algorithms.weight_only.gptq import find_layers, trace_gptq_target_blocks

    found = trace_gptq_target_blocks(model)
    names = []
    for index, block in enumerate(found["transformers"]):
        names += [f"{found['transformers_name']}.{index}.{name}" for name in find_layers(block)]
    return names, found["transformers_post"].get("name")
