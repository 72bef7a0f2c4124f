"""A PT2E quantizer for weights of 2, 4 and 8 bits, as edge targets have them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.fx import GraphModule

from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.grid import Scheme, SymmetricScale
from splitquant_pt2e import compat
from splitquant_pt2e.grid import EPS, SCHEMES, Pt2eGrid
from splitquant_pt2e.layers import layer_calls

BITS = {"int2": 2, "int4": 4, "int8": 8}


class LowBitWeightQuantizer(compat.Quantizer):
    """Quantizes the weights of Linear and convolution layers; activations stay float or become INT8.

    `scheme`: `affine` is a range that includes 0 with an integer zero point; `symmetric` has a scale only.
    `symmetric_scale`: `restricted` is max|w| / (2^(b-1) - 1) with codes ±(2^(b-1) - 1), as NPUs have it; `full`
    is PT2E's own 2 max|w| / (2^b - 1) with one code more below 0, which clips the largest positive weights.
    `activations`: None, or `int8` for the inputs of these layers, affine per tensor, from calibration.
    The codes are stored as int8 whatever the width. Unknown values are a ConfigError.
    """

    def __init__(
        self,
        weights: Literal["int2", "int4", "int8"] = "int8",
        *,
        granularity: Literal["channel", "tensor"] = "channel",
        scheme: Scheme = "affine",
        symmetric_scale: SymmetricScale = "restricted",
        activations: Literal["int8"] | None = None,
    ) -> None:
        super().__init__()
        _choose("weights", weights, tuple(BITS))
        if granularity == "group":  # type: ignore[comparison-overlap]
            raise ConfigError(
                "LowBitWeightQuantizer granularity='group': the operators that convert_pt2e writes have scales per "
                "tensor or per channel only"
            )
        _choose("granularity", granularity, ("channel", "tensor"))
        _choose("scheme", scheme, ("affine", "symmetric"))
        _choose("symmetric_scale", symmetric_scale, ("restricted", "full"))
        _choose("activations", activations, (None, "int8"))
        self.weights = weights
        self.granularity = granularity
        self.scheme = scheme
        self.symmetric_scale = symmetric_scale
        self.activations = activations

    @property
    def grid(self) -> Pt2eGrid:
        """The grid that it rounds weights to."""
        highest = 2 ** (BITS[self.weights] - 1) - 1
        restricted = self.scheme == "symmetric" and self.symmetric_scale == "restricted"
        return Pt2eGrid(-highest if restricted else -highest - 1, highest, self.scheme, self.granularity)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Ask for the weights, and the inputs where chosen, of every layer whose weight the graph stores."""
        found = False
        for call in layer_calls(model):
            if call.weight.op != "get_attr" or call.kind == "transposed convolution":
                continue
            found = True
            wanted = {call.weight: self._weight_spec(call.axis)}
            if self.activations is not None:
                wanted[call.input] = _activation_spec()
            call.node.meta[compat.ANNOTATION] = compat.QuantizationAnnotation(input_qspec_map=wanted, _annotated=True)
        if not found:
            raise InputError(
                "LowBitWeightQuantizer found no Linear or convolution with a stored weight in the graph; pass "
                "torch.export.export(model, ...).module(), not one with decomposed layers"
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Accept every graph: nothing is asked for that convert_pt2e cannot write."""

    def _weight_spec(self, axis: int) -> Any:
        grid = self.grid
        per_channel = grid.granularity == "channel"
        observer = compat.PerChannelMinMaxObserver if per_channel else compat.MinMaxObserver
        return compat.QuantizationSpec(
            dtype=torch.int8,
            quant_min=grid.lowest,
            quant_max=grid.highest,
            qscheme=next(key for key, value in SCHEMES.items() if value == (grid.scheme, grid.granularity)),
            ch_axis=axis if per_channel else None,
            is_dynamic=False,
            observer_or_fake_quant_ctr=observer.with_args(eps=EPS),
        )


def _activation_spec() -> Any:
    return compat.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=compat.HistogramObserver.with_args(eps=2**-12),
    )


def _choose(option: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ConfigError(f"LowBitWeightQuantizer option {option}={value!r}: choose from {choices}")
