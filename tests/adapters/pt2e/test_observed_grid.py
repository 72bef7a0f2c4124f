"""The grid that is found out by calling an observer is the grid that the observer and convert_pt2e make."""

from __future__ import annotations

import pytest
import torch
from splitquant_pt2e import LowBitWeightQuantizer, ObservedGrid, Pt2eGrid, grid_of_spec, stored_weights
from splitquant_pt2e.compat import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationSpec,
    convert_pt2e,
    prepare_pt2e,
)
from splitquant_pt2e.layers import stamp_names
from torch import nn
from torchao.quantization.pt2e import FakeQuantize, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.observer import PlaceholderObserver
from torchao.quantization.pt2e.quantizer import DerivedQuantizationSpec, FixedQParamsQuantizationSpec

from splitquant_plugins import SplitQuantPass
from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid


def spec(observer, **changes):
    values = {
        "dtype": torch.int8,
        "quant_min": -8,
        "quant_max": 7,
        "qscheme": torch.per_channel_symmetric,
        "ch_axis": 0,
    }
    return QuantizationSpec(observer_or_fake_quant_ctr=observer, **{**values, **changes})


WHOLE = {"qscheme": torch.per_tensor_affine, "ch_axis": None}


class CalibratedOncePerChannelObserver(PerChannelMinMaxObserver):
    """As QNN has it: under a name of its own, blind to all but the first tensor."""

    seen = False

    def forward(self, x):
        if self.seen:
            return x
        self.seen = True
        return super().forward(x)


class PowerOfTwoObserver(MinMaxObserver):
    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return torch.exp2(torch.ceil(torch.log2(scale))), zero_point


class RoundedDownPerChannelObserver(PerChannelMinMaxObserver):
    """Powers of two that clip: no closed form has them."""

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        return torch.exp2(torch.floor(torch.log2(scale))), zero_point


class LeastErrorObserver(MinMaxObserver):
    """Chooses among twenty ranges that of least squared error, as learned and searched ranges do."""

    def forward(self, x):
        super().forward(x)
        self.shown = x.detach()
        return x

    def calculate_qparams(self):
        scale, zero_point = super().calculate_qparams()
        tried = scale * torch.linspace(0.2, 1, 20).unsqueeze(1)
        codes = torch.round(self.shown.reshape(1, -1) / tried).clamp(self.quant_min, self.quant_max)
        error = (codes * tried - self.shown.reshape(1, -1)).square().sum(dim=1)
        return tried[error.argmin()], zero_point


class DriftingObserver(MinMaxObserver):
    """Widens with every tensor that it sees."""

    seen = 0

    def forward(self, x):
        self.seen += 1
        return super().forward(x * self.seen)


class BrokenObserver(MinMaxObserver):
    def forward(self, x):
        raise RuntimeError("no kernel")


CLOSED = {
    "min-max": (spec(PerChannelMinMaxObserver.with_args(eps=2**-12)), Pt2eGrid(-8, 7, "symmetric", "channel", 2**-12)),
    "default codes": (
        spec(MinMaxObserver, **WHOLE, quant_min=None, quant_max=None),
        Pt2eGrid(-128, 127, "affine", "tensor", torch.finfo(torch.float32).eps),
    ),
    "unsigned": (
        spec(MinMaxObserver, **WHOLE, dtype=torch.uint8, quant_min=0, quant_max=15),
        Pt2eGrid(0, 15, "affine", "tensor", torch.finfo(torch.float32).eps),
    ),
    "unsigned and symmetric": (  # around code 7; as QNN has it around code 128
        spec(MinMaxObserver, dtype=torch.uint8, quant_min=0, quant_max=15, qscheme=torch.per_tensor_symmetric),
        Pt2eGrid(-7, 8, "symmetric", "tensor", torch.finfo(torch.float32).eps),
    ),
    "once": (
        spec(CalibratedOncePerChannelObserver.with_args(eps=2**-20)),
        Pt2eGrid(-8, 7, "symmetric", "channel", 2**-20),
    ),
    "fake quantizer": (
        QuantizationSpec(
            torch.int8,
            FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, ch_axis=0, eps=2**-12),
            -127,
            127,
            torch.per_channel_symmetric,
        ),
        Pt2eGrid(-127, 127, "symmetric", "channel", 2**-12),
    ),
    "power of two": (
        spec(PowerOfTwoObserver.with_args(eps=2**-20), qscheme=torch.per_tensor_symmetric, ch_axis=None, quant_min=-7),
        Pt2eGrid(-7, 7, "symmetric", "tensor", 2**-20, power_of_two_scale=True),
    ),
}
OPEN = {
    "powers of two that clip": spec(RoundedDownPerChannelObserver),
    "least error": spec(LeastErrorObserver, qscheme=torch.per_tensor_symmetric, ch_axis=None),
    "histogram": spec(HistogramObserver, **WHOLE),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_grid_is_found(name):
    given, expected = CLOSED[name]
    assert grid_of_spec(given, 0) == expected


class Annotating(LowBitWeightQuantizer):
    """Asks for weights in a given way."""

    given: QuantizationSpec

    def _weight_spec(self, axis):
        return self.given


def quantizer_of(given):
    quantizer = Annotating()
    quantizer.given = given
    return quantizer


def converted(model, quantizer, x):
    graph = torch.export.export(model, (x,)).module()
    stamp_names(graph)
    prepared = prepare_pt2e(graph, quantizer)
    prepared(x)
    prepared(x)
    return convert_pt2e(prepared)


@pytest.mark.parametrize("name", [*CLOSED, *OPEN])
def test_the_grid_is_what_convert_stores(name):
    given = OPEN.get(name) or CLOSED[name][0]
    grid = grid_of_spec(given, 0)
    assert isinstance(grid, Grid)
    assert isinstance(grid, ObservedGrid if name in OPEN else Pt2eGrid)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    ((conv,), (linear,)) = stored_weights(converted(model, quantizer_of(given), torch.randn(2, 3, 4, 4))).values()
    assert torch.equal(conv.weight, grid.quantize_dequantize(model[0].weight))
    assert torch.equal(linear.weight, grid.quantize_dequantize(model[2].weight))
    assert len(conv.weight.unique()) > 3


@pytest.mark.parametrize("name", [name for name in OPEN if name != "histogram"])  # which takes long to ask
def test_grid_splitter_measures_through_the_observer(name):
    """A split in two is closer to the weights than one part, on grids that nobody has a formula for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6, bias=False))
    quantizer = quantizer_of(OPEN[name])
    graphs = [
        converted(model, q, torch.randn(2, 32)) for q in (quantizer, SplitQuantPass(splitter="grid", k=2) + quantizer)
    ]
    ((plain,), parts) = (next(iter(stored_weights(graph).values())) for graph in graphs)
    assert len(parts) == 2
    before, after = ((model[0].weight - sum(p.weight for p in group)).square().sum() for group in ([plain], parts))
    assert after < 0.1 * before


def test_scales_of_their_own_in_the_other_dimension():
    grid = grid_of_spec(spec(PerChannelMinMaxObserver, ch_axis=1), 0)
    assert isinstance(grid, ObservedGrid)
    weight = torch.randn(4, 6) * torch.logspace(-3, 3, 6)
    observer = PerChannelMinMaxObserver(1, torch.int8, torch.per_channel_symmetric, quant_min=-8, quant_max=7)
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero_point.int(), 1, -8, 7)
    assert torch.allclose(grid.quantize_dequantize(weight), expected, rtol=1e-6)
    stored_the_other_way = grid_of_spec(spec(PerChannelMinMaxObserver, ch_axis=1), 1)
    assert stored_the_other_way == Pt2eGrid(-8, 7, "symmetric", "channel", torch.finfo(torch.float32).eps)


def test_a_fixed_scale_is_a_grid():
    fixed = FixedQParamsQuantizationSpec(torch.int8, 0.5, 0, -8, 7, torch.per_tensor_affine)
    grid = grid_of_spec(fixed, 0)
    assert grid.quantize_dequantize(torch.tensor([[0.2, 0.3, 9.0]])).tolist() == [[0.0, 0.5, 3.5]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "no quantization specification"),
        (spec(BrokenObserver, **WHOLE), "cannot be called: RuntimeError: no kernel"),
        (spec(DriftingObserver, **WHOLE), "answers differently"),
        (spec(PlaceholderObserver, **WHOLE), "gives no scale and zero point"),
        (DerivedQuantizationSpec([], lambda *_: None, torch.int8), "another place of the graph"),
        (spec(MinMaxObserver, **WHOLE, dtype=torch.int16, quant_min=-32768, quant_max=32767), "2 to 8 bits"),
    ],
)
def test_what_cannot_be_asked_says_why(given, reason):
    with pytest.raises(ConfigError, match=reason):
        grid_of_spec(given, 0)


def test_a_splitter_that_needs_a_grid_names_the_layer_and_the_reason():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ConfigError, match=r"0\.weight: its observer cannot be called: RuntimeError: no kernel"):
        converted(
            model, SplitQuantPass(splitter="grid") + quantizer_of(spec(BrokenObserver, **WHOLE)), torch.randn(2, 8)
        )
