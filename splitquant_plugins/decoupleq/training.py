"""Training of learned weights and other floats, that never ends worse than it began on data held out from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from splitquant_plugins.decoupleq.capture import Call, detached
from splitquant_plugins.decoupleq.learned_rounding import LearnedRounding
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.passes.calibration import evaluating

_EVALUATIONS = 20
# Part of the steps in which the rates rise.
_WARM_UP = 0.05
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainingOptions:
    """Adam's settings; all rates rise for a short while, and fall to 0 as a cosine.

    `steps`: of the optimizer. `code_rate`, `point_rate`: learning rates of codes and of points, in codes;
    `scale_rate`: of scales, relative; `float_rate`: of norms and biases. `trains_codes`: otherwise only scales, zeros
    and floats. `seed`: of the order of the examples.
    """

    steps: int = 1000
    code_rate: float = 2e-2
    scale_rate: float = 2e-3
    point_rate: float = 5e-3
    float_rate: float = 1e-3
    trains_codes: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps}: give 0 or a positive number")
        for name in ("code_rate", "scale_rate", "point_rate", "float_rate"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or a positive number")


class Learned(nn.Module):
    """What is trained: weights by the name of the parameter they stand for, and other parameters' values by name.

    The module's own parameters are not touched: `tensors` gives what stands in for them.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, LearnedRounding], others: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.other_names = tuple(others)
        self.weights = nn.ModuleList(weights.values())
        own = dict(module.named_parameters(remove_duplicate=False))
        self.places = {name: (own[name].shape, own[name].dtype) for name in (*self.names, *self.other_names)}
        self.others = nn.ParameterList(own[name].detach().clone().float() for name in others)

    def tensors(self) -> dict[str, Tensor]:
        """What stands for the module's parameters, by name, in their shapes and dtypes."""
        found: dict[str, Tensor] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            shape, dtype = self.places[name]
            value = weight()
            found[name] = (value.t() if weight.transposed else value).reshape(shape).to(dtype)
        for name, other in zip(self.other_names, self.others, strict=True):
            found[name] = other.to(self.places[name][1])
        return found


@dataclass(frozen=True)
class Objective:
    """The errors of a module's outputs for its calls: `error(place, output)` judges the output of a call.

    A call counts as many times as it has `rows`.
    """

    module: nn.Module
    calls: Sequence[Call]
    rows: Sequence[int]
    error: Callable[[int, Any], Tensor]

    def of(self, place: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The error of one call, with `tensors`, by name, in the place of the module's own parameters."""
        args, kwargs = detached(self.calls[place])
        return self.error(place, functional_call(self.module, dict(tensors or {}), args, kwargs))

    def mean(self, places: Sequence[int], learned: Learned | None = None) -> float:
        """The mean error of these calls; infinite where it is not a number."""
        with evaluating(self.module), torch.no_grad():
            tensors = learned.tensors() if learned is not None else None  # once, and not for each call
            total = sum(self.rows[place] * float(self.of(place, tensors)) for place in places)
        mean = total / max(sum(self.rows[place] for place in places), 1)
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class TrainingReport:
    """The error on held-out calls before, after, and at every evaluation; and the steps made."""

    error_before: float
    error_after: float
    steps: int
    trace: tuple[float, ...] = ()


def train(
    learned: Learned, objective: Objective, places: Sequence[int], held_out: Sequence[int], options: TrainingOptions
) -> TrainingReport:
    """Train towards a small error of the calls at `places`; end with the best state on those `held_out`.

    That may be the state it began with. There is no early end: while codes change at full rate the error may rise, and
    it falls with the rates. Deterministic for a seed. The module is left as it was.
    """
    optimizer = torch.optim.Adam(_groups(learned, options), betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    generator = torch.Generator().manual_seed(options.seed)
    most_rows = max(objective.rows)
    best = before = objective.mean(held_out, learned)
    kept = _copied(learned)
    trace: list[float] = []
    order: list[int] = []
    step = 0
    every = max(options.steps // _EVALUATIONS, 1)
    with evaluating(objective.module), _without_gradients(objective.module):
        while step < options.steps:
            order = order or torch.randperm(len(places), generator=generator).tolist()
            place = places[order.pop()]
            optimizer.zero_grad()
            with torch.enable_grad():
                error = objective.of(place, learned.tensors())
                torch.autograd.backward(error * (objective.rows[place] / most_rows))
            optimizer.step()
            schedule.step()
            step += 1
            if step % every == 0 or step == options.steps:
                mean = objective.mean(held_out, learned)
                trace.append(mean)
                if mean < best:
                    best, kept = mean, _copied(learned)
    learned.load_state_dict(kept)
    return TrainingReport(before, best, step, tuple(trace))


def _rate(step: int, steps: int) -> float:
    """The part of the learning rates at a step: risen linearly, fallen as a cosine."""
    return min(1.0, (step + 1) / max(_WARM_UP * steps, 1)) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own parameters, for the time of the block."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _groups(learned: Learned, options: TrainingOptions) -> list[dict[str, object]]:
    weights = [weight for weight in learned.weights if isinstance(weight, LearnedRounding)]
    for weight in weights:
        weight.latent.requires_grad_(options.trains_codes)
        # Whole zero points are as good as codes.
        moves = weight.grid.zero == "free" or (weight.grid.zero == "integer" and options.trains_codes)
        weight.point.requires_grad_(moves)
    groups = [
        ([weight.latent for weight in weights], options.code_rate),
        ([weight.log_scale for weight in weights], options.scale_rate),
        ([weight.point for weight in weights], options.point_rate),
        (list(learned.others), options.float_rate),
    ]
    chosen = [([value for value in some if value.requires_grad], rate) for some, rate in groups]
    return [{"params": some, "lr": rate} for some, rate in chosen if some]


def _copied(learned: Learned) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learned.state_dict().items()}
