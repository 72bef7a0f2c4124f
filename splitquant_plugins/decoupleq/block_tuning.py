"""The block stage of decoupleQ (arXiv 2404.12759, section 3.4): tune the floats of a whole block.

With the codes frozen, scales, zeros, norms and (optionally) biases are trained so that a block of the model
gives the outputs of the float block, on inputs that the already quantized blocks before it produce. No
labels are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from splitquant_plugins.decoupleq.capture import Call, detached, output_tensor
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.calibration import evaluating


class QuantizedAffine(nn.Module):
    """A weight scale * code + zero with trainable scale and zero, of a given shape.

    `codes`: [out, d] integers; `scale`, `zero`: [out or 1, groups], where `group_of_column` [d] is the group of
    each column (all in group 0 if absent). `shape` is that of the layer's weight (default: that of `codes`);
    `trains_zero=False` keeps the zero in its ratio to the scale, as an integer zero point (or 0) needs it.
    """

    codes: Tensor
    group_of_column: Tensor
    ratio: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        group_of_column: Tensor | None = None,
        shape: Sequence[int] | None = None,
        trains_zero: bool = True,
    ) -> None:
        super().__init__()
        if group_of_column is None:
            group_of_column = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.device)
        self.register_buffer("codes", codes)
        self.register_buffer("group_of_column", group_of_column)
        self.register_buffer("ratio", zero / scale)
        self.shape = torch.Size(shape if shape is not None else codes.shape)
        self.scale = nn.Parameter(scale.detach().clone())
        self.zero = nn.Parameter(zero.detach().clone()) if trains_zero else None

    def forward(self) -> Tensor:
        """The weight."""
        zero = self.scale * self.ratio if self.zero is None else self.zero
        groups = self.group_of_column
        values = self.codes.to(self.scale.dtype) * self.scale[:, groups] + zero[:, groups]
        return values.reshape(self.shape)


@dataclass(frozen=True)
class BlockOptions:
    """Options of the block stage; Adam has betas (0.9, 0.99), as in the paper.

    `learning_rate` is relative for scales and zeros (a step of 1e-3 changes a scale by about 0.1 % of the
    layer's mean scale) and absolute for norms and biases. `epochs` over the calls, shuffled with `seed`;
    `trains_norms`: also affine parameters of norm layers; `trains_biases`: also the biases of the layers.
    """

    learning_rate: float = 1e-3
    epochs: int = 8
    trains_norms: bool = True
    trains_biases: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or not self.learning_rate > 0:
            raise ConfigError(
                f"epochs={self.epochs}, learning_rate={self.learning_rate}: epochs cannot be negative, and "
                "the learning rate must be above 0"
            )


@dataclass(frozen=True)
class BlockReport:
    """Mean square error of the block's output before and after, and after each epoch (`trace`)."""

    error_before: float
    error_after: float
    trace: tuple[float, ...]


def tune_block(
    block: nn.Module,
    layers: Mapping[str, QuantizedAffine],
    inputs: Sequence[Call],
    targets: Sequence[Tensor],
    options: BlockOptions | None = None,
    *,
    masks: Sequence[Tensor | None] | None = None,
) -> BlockReport:
    """Train the floats of `block`'s quantized layers until its outputs come close to `targets`.

    `layers`: names of submodules of the block with their quantized weights; while training, these take the
    place of `weight`, and in the end their best state is written both into `layers` and as plain values into
    the block's weights. `inputs`: calls (args, kwargs); `targets`: the float block's output for each, as
    `output_tensor` takes it. `masks`: per call the positions that count, of the leading shape of the output.

    The block ends with the best state seen (the initial one, if training never helped). On an exception it
    gets back the weights it came with. Its other parameters are never changed. Deterministic for a seed.
    """
    options = options or BlockOptions()
    masks = masks if masks is not None else [None] * len(inputs)
    if not inputs or not len(inputs) == len(targets) == len(masks):
        raise InputError(
            f"{len(inputs)} inputs, {len(targets)} targets, {len(masks)} masks: expected the same number of "
            "each, and at least one"
        )
    parameters = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    requires_grad = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    states = {name: _copied(layer.state_dict()) for name, layer in layers.items()}
    try:
        with evaluating(block), torch.enable_grad():
            report = _train(block, layers, inputs, targets, masks, options)
    except BaseException:
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(parameters[name])
        for name, layer in layers.items():
            layer.load_state_dict(states[name])
        raise
    finally:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(requires_grad[name])
            parameter.grad = None
    return report


def _train(
    block: nn.Module,
    layers: Mapping[str, QuantizedAffine],
    inputs: Sequence[Call],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    options: BlockOptions,
) -> BlockReport:
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    others = list(other_parameters(block, layers, options))
    groups: list[dict[str, Any]] = []
    for layer in layers.values():
        floats = list(layer.parameters())
        # Adam's steps do not depend on the gradient's size, so they are measured in the layer's scale.
        unit = float(layer.scale.detach().abs().mean()) or 1.0
        groups.append({"params": floats, "lr": options.learning_rate * unit})
    groups.append({"params": others, "lr": options.learning_rate})
    trained = [parameter for group in groups for parameter in group["params"]]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(options.seed)

    best_error = before = _error(block, layers, inputs, targets, masks)
    best = [parameter.detach().clone() for parameter in trained]
    trace = []
    for _ in range(options.epochs):
        for index in torch.randperm(len(inputs), generator=generator).tolist():
            optimizer.zero_grad()
            output = _output(block, layers, inputs[index])
            loss = _square_error(output, targets[index], masks[index])[0]
            torch.autograd.backward(loss)
            optimizer.step()
        error = _error(block, layers, inputs, targets, masks)
        trace.append(error)
        positive = all(bool((layer.scale > 0).all()) for layer in layers.values())
        if error < best_error and positive:
            best_error = error
            best = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = block.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(layer())
    return BlockReport(before, best_error, tuple(trace))


def other_parameters(block: nn.Module, layers: Iterable[str], options: BlockOptions) -> Iterator[nn.Parameter]:
    """The parameters besides the weights of `layers` that `tune_block` trains."""
    if options.trains_biases:
        for name in layers:
            bias = block.get_submodule(name).bias
            if isinstance(bias, nn.Parameter):
                yield bias
    if options.trains_norms:
        for module in block.modules():
            # Covers LayerNorm, GroupNorm, BatchNorm, and the RMSNorms that libraries define for themselves.
            if "Norm" in type(module).__name__:
                yield from module.parameters(recurse=False)


def _output(block: nn.Module, layers: Mapping[str, QuantizedAffine], call: Call) -> Tensor:
    """The block's output with the quantized weights in the place of its own, which stay untouched."""
    weights = {f"{name}.weight" if name else "weight": layer() for name, layer in layers.items()}
    return output_tensor(functional_call(block, weights, *detached(call)))


def _error(
    block: nn.Module,
    layers: Mapping[str, QuantizedAffine],
    inputs: Sequence[Call],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for call, target, mask in zip(inputs, targets, masks, strict=True):
            mean, number = _square_error(_output(block, layers, call), target, mask)
            total += float(mean) * number
            count += number
    return total / max(count, 1)


def _square_error(output: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Mean square error where the mask counts, and the number of values in it."""
    difference = output - target
    if mask is not None and difference.shape[: mask.ndim] == mask.shape:
        difference = difference[mask.to(difference.device) != 0]
    return difference.square().mean(), difference.numel()


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
