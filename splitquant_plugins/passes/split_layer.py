"""Splitting the tensors of one layer: pure work on tensors, which joblib may carry elsewhere."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitquant_plugins.errors import CannotSplit, ConfigError, SplitFailedError, SplitQuantWarning
from splitquant_plugins.grid import Grid
from splitquant_plugins.passes.budget import Candidate
from splitquant_plugins.passes.checks import check_parts
from splitquant_plugins.plan import TensorPlan
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.solvers.rounding_error import output_error

BUDGET_PARTS = (1, 2, 3, 4)


@dataclass(frozen=True)
class SplitTensors:
    """The parts of one layer's weight and bias, or why it stays whole."""

    weight: list[Tensor]
    bias: list[Tensor | None]
    seconds: float
    reason: str | None = None


class LayerSplitter:
    """Splits the tensors of one layer; joblib may carry it to another process."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    @torch.no_grad()
    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_plan: TensorPlan,
        bias_plan: TensorPlan | None,
        grid: Grid | None,
    ) -> SplitTensors:
        started = time.perf_counter()
        try:
            weights = self._parts(weight, weight_plan, grid)
            if len(weights) == 1:
                raise CannotSplit("one part is the layer itself")
            found = [] if bias is None else self._bias_parts(bias, bias_plan, len(weights))
        except CannotSplit as answer:
            return SplitTensors([], [], time.perf_counter() - started, answer.reason)
        except SplitFailedError as error:
            warnings.warn(f"{error}; the layer is left whole", SplitQuantWarning, stacklevel=2)
            return SplitTensors([], [], time.perf_counter() - started, f"it failed the check: {error}")
        biases = [*found, *[None] * (len(weights) - len(found))]
        return SplitTensors(weights, biases, time.perf_counter() - started)

    def _parts(self, tensor: Tensor, plan: TensorPlan, grid: Grid | None) -> list[Tensor]:
        parts = self._plugins.split_tensor(tensor, plan, grid)
        check_parts(f"{plan.layer}.{plan.role}", tensor, parts, plan.k)
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

    def __call__(
        self, weight: Tensor, bias: Tensor | None, plan: TensorPlan, bias_plan: TensorPlan | None, grid: Grid | None
    ) -> list[Candidate]:
        """Return the candidates, with the squared error of the layer's weights, or of its outputs with calibration.

        Relative to the layer's own energy, errors ask for parts where the weights are small and matter little;
        measured, absolute ones keep more of a model's outputs at the same budget.
        """
        if grid is None:
            raise ConfigError(f"budget: the recipe states no grid for {plan.layer}, so gains cannot be measured")
        candidates = []
        for k in BUDGET_PARTS:
            parts = [weight] if k == 1 else self._split(weight, None, replace(plan, k=k), None, grid).weight
            if parts:
                error = output_error(weight, parts, grid, plan.second_moment)
                bits = len(parts) * grid.stored_bits(weight.shape)
                candidates.append(Candidate(k, bits, error))
        return candidates
