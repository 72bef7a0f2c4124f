"""Splitting the tensors of one layer, and the check of it: pure work on tensors, which joblib may carry elsewhere."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from splitquant_plugins.errors import CannotSplit, ConfigError, SplitFailedError, SplitQuantWarning
from splitquant_plugins.grid import Granularity, Grid
from splitquant_plugins.passes.budget import Candidate
from splitquant_plugins.passes.checks import refuse_malformed_parts, refuse_wrong_sum
from splitquant_plugins.plan import LayerPlan, TensorPlan
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.solvers.rounding_error import output_error, rounds_rows_alone

MOST_BUDGET_PARTS = 4
# Sums of squares in another order differ by less, relative to the sum.
ROUNDING = 1e-9
# Weights of a layer that a budget's candidates are measured with.
_MEASURED = 1 << 17


@dataclass(frozen=True)
class Errors:
    """Error of a layer's weight on the recipe's grid, `whole` and `split`; see `output_error`."""

    whole: float
    split: float

    @property
    def lowered(self) -> bool:
        """Whether the split lowers the error by more than rounding."""
        return self.split < self.whole * (1 - ROUNDING)


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

    `shared_with` names the layer whose weight, and so whose parts, are those of this one. `splitter` was asked for
    them, `why` says what chose it where the user did not, and `error` what the recipe's grid leaves, where it is known.
    """

    weight: list[Tensor]
    bias: list[Tensor | None]
    seconds: float
    reason: str | None = None
    shared_with: str | None = None
    splitter: str = ""
    why: str = ""
    granularity: Granularity = "tensor"
    error: Errors | None = None


@torch.no_grad()
def split_task(task: LayerTask, plugins: Plugins) -> SplitTensors:
    """Return the parts, as many of the weight as of the bias; what is no answer at all leaves the layer whole.

    Where the grid is known, so does a split that does not lower the error, unless its splitter always splits.
    """
    started = time.perf_counter()
    stand_in = plugins.splitter(task.weight_plan.splitter).stand_in(task.grid)
    plan = task.weight_plan if stand_in is None else replace(task.weight_plan, splitter=stand_in.splitter)
    splitter = plugins.splitter(plan.splitter)
    why = "" if stand_in is None else stand_in.why
    error: Errors | None = None
    try:
        weights = _parts(task.weight, plan, task.grid, plugins)
        if len(weights) == 1:
            raise CannotSplit("one part is the layer itself")
        error = None if task.grid is None else _errors(task.weight, weights, task.grid, plan.second_moment)
        if error is not None and not error.lowered and not splitter.always_splits:
            raise CannotSplit(_no_gain(error, plan))
        biases = [] if task.bias is None else [task.bias.clone()]  # kept by the first part
        if task.bias is not None and task.bias_plan is not None and splitter.splits_bias:
            bias_plan = replace(task.bias_plan, k=len(weights), splitter=plan.splitter)
            with suppress(CannotSplit):  # a constant bias, often all zero
                biases = _parts(task.bias, bias_plan, None, plugins)
    except CannotSplit as answer:
        seconds = time.perf_counter() - started
        return SplitTensors([], [], seconds, answer.reason, splitter=plan.splitter, why=why, error=error)
    except SplitFailedError as failure:
        return _failed(failure, time.perf_counter() - started)
    return SplitTensors(
        weights,
        [*biases, *[None] * (len(weights) - len(biases))],
        time.perf_counter() - started,
        splitter=plan.splitter,
        why=why,
        granularity=plan.granularity,
        error=error,
    )


def _parts(tensor: Tensor, plan: TensorPlan, grid: Grid | None, plugins: Plugins) -> list[Tensor]:
    parts = plugins.split_tensor(tensor, plan, grid)
    refuse_malformed_parts(f"{plan.layer}.{plan.role}", tensor, parts, plan.k)
    return parts


def _errors(weight: Tensor, parts: Sequence[Tensor], grid: Grid, second_moment: Tensor | None) -> Errors:
    return Errors(output_error(weight, [weight], grid, second_moment), output_error(weight, parts, grid, second_moment))


def _no_gain(error: Errors, plan: TensorPlan) -> str:
    what = "the weight's" if plan.second_moment is None else "the outputs'"
    return (
        f"on the recipe's grid its split by {plan.splitter!r} does not lower {what} squared error: "
        f"{error.whole:.4g} whole, {error.split:.4g} split"
    )


def measure_candidates(task: LayerTask, plugins: Plugins) -> list[Candidate]:
    """Return what 1 to 4 parts store, and the squared error of the layer's weights, or of its outputs with calibration.

    Relative to the layer's own energy, errors ask for parts where the weights are small and matter little;
    measured, absolute ones keep more of a model's outputs at the same budget. Of a large weight, rows are measured.
    """
    plan, grid = task.weight_plan, task.grid
    if grid is None:
        raise ConfigError(f"budget: the recipe states no grid for {plan.layer}, so gains cannot be measured")
    bits = grid.stored_bits(task.weight.shape)
    weight = _even_rows(task.weight, grid, plan.second_moment)
    times = task.weight.numel() / max(weight.numel(), 1)
    candidates = [Candidate(1, bits, times * output_error(weight, [weight], grid, plan.second_moment))]
    for k in range(2, MOST_BUDGET_PARTS + 1):
        split = split_task(replace(task, weight=weight, bias=None, weight_plan=replace(plan, k=k)), plugins)
        if split.error is not None:
            candidates.append(Candidate(k, len(split.weight) * bits, times * split.error.split))
    return candidates


def _even_rows(weight: Tensor, grid: Grid, second_moment: Tensor | None) -> Tensor:
    """As many even rows as hold `_MEASURED` weights, where the grid rounds each by itself; else the weight.

    Errors of one layer's candidates differ by factors, and those of rows by percents.
    """
    if weight.ndim < 2 or weight.numel() <= _MEASURED or (second_moment is not None and len(second_moment) > 1):
        return weight
    rows = max(2, _MEASURED // weight[0].numel())
    if rows >= len(weight) or not rounds_rows_alone(grid, weight):
        return weight
    return weight[torch.linspace(0, len(weight) - 1, rows, device=weight.device).round().long()]


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
