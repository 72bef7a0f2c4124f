"""The block stage: the quantized weights of a block, and its norms, trained towards the float model's outputs.

decoupleQ (arXiv 2404.12759, section 3.4) trains scales, zeros and norms with frozen codes; here the codes are learned,
too. The block gets the inputs that the already quantized blocks before it produce. No labels are used.

Blocks that follow each other directly can be trained together, towards the outputs of the last one, so that the first
learns what the second can make up for (cross-block reconstruction; CBQ, arXiv 2312.07950).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.capture import Call, block_outputs, detached
from splitquant_plugins.decoupleq.training import Objective
from splitquant_plugins.passes.outputs import output_tensor


class BlockChain(nn.Module):
    """Blocks of which each takes the outputs of the one before, to be replayed call by call.

    `calls`: for each block the calls that the model makes of it, one per example; the first argument of all but the
    first block's is not kept.
    """

    def __init__(self, blocks: Sequence[nn.Module], calls: Sequence[Sequence[Call]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.first = calls[0]
        self.others = [[(args[1:], kwargs) for args, kwargs in each] for each in calls[1:]]

    def forward(self, place: int) -> Tensor:
        """Replay the calls of an example; the outputs of the last block."""
        args, kwargs = detached(self.first[place])
        values = output_tensor(self.blocks[0](*args, **kwargs))
        for block, calls in zip(self.blocks[1:], self.others, strict=True):
            args, kwargs = detached(calls[place])
            values = output_tensor(block(values, *args, **kwargs))
        return values


def follows(block: nn.Module, calls: Sequence[Call], following: Sequence[Call]) -> bool:
    """Whether the calls of another block have the outputs of `block`, and nothing else of it, as first argument."""
    outputs = block_outputs(block, calls[:1])
    for output, (args, kwargs) in zip(outputs, following[:1], strict=True):
        given = args[0] if args else None
        if not isinstance(given, Tensor) or given.shape != output.shape or not torch.equal(given, output):
            return False
        if any(isinstance(v, Tensor) and v.shape == output.shape for v in (*args[1:], *kwargs.values())):
            return False
    return True


def block_objective(
    chain: BlockChain, targets: Sequence[Tensor], rows: Sequence[int], masks: Sequence[Tensor | None]
) -> Objective:
    """The square error of the chain's outputs, as a part of the targets' mean square.

    `targets`: the last block's outputs in the float model, as `output_tensor` takes them. `masks`: per call the
    positions that count, of the leading shape of the output, or None. `rows`: what each call counts.
    """
    sizes = [float(_masked(target, mask).square().mean()) for target, mask in zip(targets, masks, strict=True)]
    size = max(sum(sizes) / len(sizes), 1e-30)

    def error(place: int, output: Any) -> Tensor:
        difference = output_tensor(output).float() - targets[place].float()
        return _masked(difference, masks[place]).square().mean() / size

    return Objective(chain, [((place,), {}) for place in range(len(targets))], rows, error)


def other_parameters(block: nn.Module, layers: Iterable[str], *, norms: bool, biases: bool) -> Iterator[str]:
    """Names of the parameters besides the weights of `layers` (names of modules) that are trained."""
    if biases:
        for name in layers:
            if isinstance(block.get_submodule(name).bias, nn.Parameter):
                yield f"{name}.bias" if name else "bias"
    if norms:
        for prefix, module in block.named_modules():
            # Covers LayerNorm, GroupNorm, BatchNorm, and the RMSNorms that libraries define for themselves.
            if "Norm" in type(module).__name__:
                for name, _ in module.named_parameters(recurse=False):
                    yield f"{prefix}.{name}" if prefix else name


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values where the mask counts."""
    if mask is not None and values.shape[: mask.ndim] == mask.shape:
        return values[mask.to(values.device) != 0]
    return values
