"""Splitting the tensors of one layer, and the check of it: pure work on tensors, which joblib may carry elsewhere."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import CannotSplit, ConfigError, SplitFailedError, SplitQuantWarning
from splitquant_plugins.passes.budget import Candidate
from splitquant_plugins.passes.checks import refuse_malformed_parts, refuse_wrong_sum
from splitquant_plugins.solvers.rounding_error import output_error

if TYPE_CHECKING:
    from splitquant_plugins.grid import Grid
    from splitquant_plugins.plan import LayerPlan, TensorPlan
    from splitquant_plugins.plugins import Plugins

BUDGET_PARTS = (1, 2, 3, 4)


@dataclass(frozen=True)
class LayerTask:
    """The tensors of one layer, detached, and how each is to be split; without a `bias_plan` a bias stays whole."""

    weight: Tensor
    bias: Tensor | None
    weight_plan: TensorPlan
    bias_plan: TensorPlan | None
    grid: Grid | None


@dataclass(frozen=True)
class SplitTensors:
    """The parts of one layer's weight and bias, or why it stays whole.

    `shared_with` names the layer whose weight, and so whose parts, are those of this one.
    """

    weight: list[Tensor]
    bias: list[Tensor | None]
    seconds: float
    reason: str | None = None
    shared_with: str | None = None


class LayerSplitter:
    """Splits the tensors of one layer; joblib may carry it to another process."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    @torch.no_grad()
    def __call__(self, task: LayerTask) -> SplitTensors:
        """Return the parts, as many of the weight as of the bias; what is no answer at all leaves the layer whole."""
        started = time.perf_counter()
        try:
            weights = self._parts(task.weight, task.weight_plan, task.grid)
            if len(weights) == 1:
                raise CannotSplit("one part is the layer itself")
            found = [] if task.bias is None else self._bias_parts(task.bias, task.bias_plan, len(weights))
        except CannotSplit as answer:
            return SplitTensors([], [], time.perf_counter() - started, answer.reason)
        except SplitFailedError as error:
            return _failed(error, time.perf_counter() - started)
        biases = [*found, *[None] * (len(weights) - len(found))]
        return SplitTensors(weights, biases, time.perf_counter() - started)

    def _parts(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> list[Tensor]:
        parts = self._plugins.split_tensor(tensor, plan, grid)
        refuse_malformed_parts(f"{plan.layer}.{plan.role}", tensor, parts, plan.k)
        return parts

    def _bias_parts(self, bias: Tensor, plan: TensorPlan | None, k: int) -> list[Tensor]:
        if plan is None:
            return [bias.clone()]
        try:
            return self._parts(bias, replace(plan, k=k), None)
        except CannotSplit:  # a constant bias, often all zero, stays in the first part
            return [bias.clone()]


class CandidateMeasure:
    """Measures, for one layer, what 1 to 4 parts store and what error the grid leaves of them."""

    def __init__(self, plugins: Plugins) -> None:
        self._split = LayerSplitter(plugins)

    def __call__(self, task: LayerTask) -> list[Candidate]:
        """Return the candidates, with the squared error of the layer's weights, or of its outputs with calibration.

        Relative to the layer's own energy, errors ask for parts where the weights are small and matter little;
        measured, absolute ones keep more of a model's outputs at the same budget.
        """
        weight, plan, grid = task.weight, task.weight_plan, task.grid
        if grid is None:
            raise ConfigError(f"budget: the recipe states no grid for {plan.layer}, so gains cannot be measured")
        candidates = []
        for k in BUDGET_PARTS:
            one = replace(task, bias=None, weight_plan=replace(plan, k=k))
            parts = [weight] if k == 1 else self._split(one).weight
            if parts:
                error = output_error(weight, parts, grid, plan.second_moment)
                bits = len(parts) * grid.stored_bits(weight.shape)
                candidates.append(Candidate(k, bits, error))
        return candidates


@torch.no_grad()
def check_split(name: str, plan: LayerPlan, tensors: SplitTensors) -> SplitTensors:
    """Check that the parts sum to the layer's tensors; where they do not, warn and answer why the layer stays whole."""
    if tensors.reason is not None:
        return tensors
    started = time.perf_counter()
    try:
        refuse_wrong_sum(f"{name}.weight", plan.weight, tensors.weight)
        if plan.bias is not None:
            refuse_wrong_sum(f"{name}.bias", plan.bias, [part for part in tensors.bias if part is not None])
    except SplitFailedError as error:
        return _failed(error, tensors.seconds)
    return replace(tensors, seconds=tensors.seconds + time.perf_counter() - started)


def as_parameters(plan: LayerPlan, tensors: SplitTensors) -> SplitTensors:
    """Make parameters of the parts, trained where the layer's own are."""
    weight_grad = plan.weight.requires_grad
    bias_grad = plan.bias is not None and plan.bias.requires_grad
    return replace(
        tensors,
        weight=[nn.Parameter(part, requires_grad=weight_grad) for part in tensors.weight],
        bias=[None if part is None else nn.Parameter(part, requires_grad=bias_grad) for part in tensors.bias],
    )


def share_parts(plan: LayerPlan, owner: str, tensors: SplitTensors) -> SplitTensors:
    """Return the parts of a layer's weight for another layer with the same weight; its bias stays whole."""
    bias = [plan.bias, *[None] * (len(tensors.weight) - 1)] if tensors.weight else []
    return replace(tensors, bias=bias, seconds=0.0, shared_with=owner)


def _failed(error: SplitFailedError, seconds: float) -> SplitTensors:
    warnings.warn(f"{error}; the layer is left whole", SplitQuantWarning, stacklevel=3)
    return SplitTensors([], [], seconds, f"it failed the check: {error}")
