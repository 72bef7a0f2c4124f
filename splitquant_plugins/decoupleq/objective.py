"""What is minimised: tr((Ŵ - W) H (Ŵ - W)ᵀ), the mean square error of a layer's outputs.

H is the second moment of the layer's inputs (decoupleQ, arXiv 2404.12759, eq. 6; the same as in GPTQ). The
rows of W are independent of each other, so everything here is per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.solvers.gptq import Factor


@dataclass(frozen=True)
class Rows:
    """Rows of a weight [rows, d] that see the same inputs, with their prepared second moment [d, d]."""

    weight: Tensor
    moment: Tensor

    @cached_property
    def factor(self) -> Factor:
        """The second moment's factor, for error feedback."""
        return Factor.of(self.moment)

    @cached_property
    def column_sums(self) -> Tensor:
        """Those of the second moment, [d]."""
        return self.moment.sum(dim=0)

    def of(self, weight: Tensor) -> Rows:
        """Other rows that see the same inputs."""
        rows = Rows(weight, self.moment)
        rows.__dict__.update(factor=self.factor, column_sums=self.column_sums)
        return rows

    def some(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        rows = self.of(self.weight[index])
        rows.__dict__["weighted"] = self.weighted[index]
        return rows

    @cached_property
    def weighted(self) -> Tensor:
        """The weight times the second moment."""
        return self.weight @ self.moment


def prepared_moment(second_moment: Tensor, damping: float) -> Tensor:
    """Symmetric float64 copy of H [d, d] with `damping` times its mean diagonal added to the diagonal.

    Damping keeps the weights of inputs that the data never excited near their float values. It must be
    positive for a singular H: the factorisation needs a definite matrix, so at least 1e-8 is added. A zero H
    becomes the identity, plain squared error of the weights. Raises InputError for NaN or infinity and
    ConfigError for a negative damping.
    """
    if not damping >= 0:
        raise ConfigError(f"damping={damping}: give 0 or a positive number, such as 0.01")
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise InputError(f"the second moment has shape {tuple(second_moment.shape)}: expected [d, d]")
    if not torch.isfinite(second_moment).all():
        raise InputError("the second moment contains NaN or infinity; check the calibration inputs")
    moment = second_moment.to(torch.float64)
    moment = (moment + moment.mT) / 2
    mean_diagonal = moment.diagonal().mean()
    if mean_diagonal <= 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    moment.diagonal().add_(max(damping, 1e-8) * mean_diagonal)
    return moment


def problem_of(weight: Tensor, second_moment: Tensor, damping: float) -> list[Rows]:
    """Cut a weight [out, d] into the rows of each group of `second_moment` [groups, d, d] or [d, d].

    Raises InputError where shapes disagree or values are not finite.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"the weight has shape {tuple(weight.shape)}: expected [out, d], neither of them 0")
    if not torch.isfinite(weight).all():
        raise InputError("the weight contains NaN or infinity; it cannot be quantized")
    moments = second_moment if second_moment.ndim == 3 else second_moment[None]
    if moments.shape[1:] != (weight.shape[1], weight.shape[1]) or weight.shape[0] % len(moments):
        raise InputError(
            f"a weight of shape {tuple(weight.shape)} does not fit a second moment of shape "
            f"{tuple(second_moment.shape)}: expected [groups, d, d] with groups dividing the outputs"
        )
    chunks = weight.to(torch.float64).chunk(len(moments))
    return [Rows(rows, prepared_moment(moment, damping)) for rows, moment in zip(chunks, moments, strict=True)]


def row_errors(difference: Tensor, moment: Tensor) -> Tensor:
    """Error d H dᵀ of each row d of a difference [rows, d] of weights: [rows]."""
    return ((difference @ moment) * difference).sum(dim=1).clamp(min=0)


def problem_errors(problem: Sequence[Rows], values: Tensor) -> Tensor:
    """Error of each row of values [out, d] that stand for the weights of the problem: [out]."""
    chunks = torch.split(values, [len(rows.weight) for rows in problem])
    errors = [row_errors(part - rows.weight, rows.moment) for part, rows in zip(chunks, problem, strict=True)]
    return torch.cat(errors)
