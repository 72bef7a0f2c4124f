"""Second moments of layer inputs weighted by what the model's predictions lose: an objective that knows the end.

A change of a layer's outputs by e costs the model's predictions about (gᵀ e)² / 2 in divergence, with g the gradient of
the log-likelihood of a prediction drawn from the model itself: the mean of g gᵀ is the Fisher information, which is the
Hessian of that divergence, and needs no labels. With the outputs of a layer taken for independent, and those of a group
for equally important, a change D of its rows costs tr(D H Dᵀ) with H the mean of s x xᵀ, where s is the mean of the g²
of the group for the token (GuidedQuant, arXiv 2505.07004). So errors of different layers, too, are in one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import InputError
from splitquant_plugins.passes.calibration import (
    CONVOLUTIONS,
    Batches,
    SecondMoment,
    counted_rows,
    evaluating,
    input_rows,
    iter_calls,
    moment_shape,
    naming_batch,
    only_input,
    out_features,
    refuse_not_finite,
)
from splitquant_plugins.passes.outputs import predictions
from splitquant_plugins.passes.token_masks import MaskFinder, TokenMasks


def collect_loss_moments(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, nn.Module],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, SecondMoment]:
    """Run the batches through the model, forwards and backwards, and return the weighted moment of every layer.

    `groups`: into so many runs of output channels, each with a weight of its own, a layer is cut, or into fewer, that
    divide the channels evenly; a grouped convolution has one for each of its own groups. Matrices are [groups, d, d].
    Batches and errors are those of `iter_gradients`.
    """
    sums = {name: _WeightedMean(name, layer, groups, dtype) for name, layer in layers.items()}
    for name, inputs, gradient, mask in iter_gradients(model, batches, layers):
        sums[name].add(inputs, gradient, mask)
    return {name: SecondMoment(mean.matrix, mean.samples) for name, mean in sums.items()}


def collect_gradient_moments(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """G [out, out], float64, of every layer that is no convolution: the mean of g gᵀ over the tokens.

    Left out are layers that the predictions do not depend on. Batches and errors are those of `iter_gradients`.
    """
    chosen = {name: layer for name, layer in layers.items() if not isinstance(layer, CONVOLUTIONS)}
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    for name, _, gradient, mask in iter_gradients(model, batches, chosen):
        rows = counted_rows(gradient, mask).double()
        sums[name] = sums.get(name, 0.0) + rows.T @ rows
        seen[name] = seen.get(name, 0) + len(rows)
    return {name: total / max(seen[name], 1) for name, total in sums.items() if bool((total.diagonal() > 0).all())}


def iter_gradients(
    model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Yield name, inputs, the gradient by the outputs, and the mask of the tokens, of each call of each layer.

    The outputs of a model without `logits` are taken for means of normal distributions: the cost is their square error.
    Predictions and directions are drawn with seed 0. Batches as `iter_second_moments` takes them. Raises InputError for
    NaN, and for a model that computes without gradients.
    """
    generator = torch.Generator().manual_seed(0)
    finder, seen = MaskFinder(model), False
    for number, (args, kwargs) in enumerate(iter_calls(model, batches), start=1):
        with evaluating(model), naming_batch(number, model):
            masks = finder.masks(args, kwargs)
            found = _gradients(model, layers, (args, kwargs), masks, generator)
        for name, inputs, gradient in found:
            yield name, inputs, gradient, masks.of(layers[name])
        seen = True
    if not seen:
        raise InputError("no calibration batches: the iterable is empty (or a one-shot iterator was used up)")


@torch.inference_mode(False)
@torch.enable_grad()
def _gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    masks: TokenMasks,
    generator: torch.Generator,
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, inputs and gradient of each call of the layers in one call of the model."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(_watching(name, calls), with_kwargs=True).remove)
        args, kwargs = call
        values, is_logits = predictions(model(*args, **kwargs))
    if not values.requires_grad:
        raise InputError(f"{type(model).__name__} computes without gradients: choose objective='outputs'")
    counted = counted_rows(values, masks.own)
    loss = _likelihood(counted, generator) if is_logits else _direction(counted, generator)
    gradients = torch.autograd.grad(loss, [probe for *_, probe in calls], allow_unused=True)
    found = []
    for (name, inputs, probe), gradient in zip(calls, gradients, strict=True):
        if gradient is not None and not torch.isfinite(gradient).all():
            raise InputError(f"{name}: the gradients of its outputs contain NaN or infinity; use a wider dtype")
        # What the predictions do not depend on costs them nothing.
        found.append((name, inputs, torch.zeros_like(probe) if gradient is None else gradient))
    return found


def _likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of predictions drawn from the model, summed over the rows of logits [n, classes]."""
    chances = logits.detach().float().softmax(dim=-1).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
    return -logits.float().log_softmax(dim=-1).gather(1, drawn).sum()


def _direction(values: Tensor, generator: torch.Generator) -> Tensor:
    """The inner product with random normal numbers, whose gradient has the second moment of the square error's."""
    return (values.float() * torch.randn(values.shape, generator=generator).to(values.device)).sum()


def _watching(name: str, calls: list[tuple[str, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A hook that notes a layer's inputs, and adds zeros to its outputs whose gradient is theirs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        inputs = only_input(name, args, kwargs).detach().clone()
        refuse_not_finite(name, inputs)
        probe = torch.zeros_like(output, requires_grad=True)
        calls.append((name, inputs, probe))
        return output + probe

    return hook


class _WeightedMean:
    """The mean of s x xᵀ over the inputs x of one layer, for each group of its outputs: `matrix` [groups, d, d]."""

    def __init__(self, name: str, layer: nn.Module, groups: int, dtype: torch.dtype) -> None:
        self.name, self.layer, self.samples = name, layer, 0
        self._inputs, width, _ = moment_shape(name, layer)
        outputs = out_features(layer)
        self._groups = self._inputs if self._inputs > 1 else max(n for n in range(1, groups + 1) if outputs % n == 0)
        device = next(layer.parameters()).device
        self.matrix = torch.zeros(self._groups, width, width, dtype=dtype, device=device)

    def add(self, inputs: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        """Take in a call: its inputs, and the gradient of its outputs."""
        if isinstance(self.layer, CONVOLUTIONS):
            gradient = gradient.movedim(1 - self.layer.weight.ndim, -1)
            rows, gradients = input_rows(self.layer, inputs), gradient.reshape(-1, gradient.shape[-1])
        else:
            rows, gradients = counted_rows(inputs, mask)[None], counted_rows(gradient, mask)
        weights = gradients.to(self.matrix).square().reshape(len(gradients), self._groups, -1).mean(dim=2)
        total = self.samples + len(weights)
        if not total:
            return
        for group in range(self._groups):
            x = rows[group % len(rows)].to(self.matrix)
            weighted = x * weights[:, group, None]
            self.matrix[group].addmm_(weighted.T, x, beta=self.samples / total, alpha=1 / total)
        self.samples = total
