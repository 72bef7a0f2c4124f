"""The grid that a stock quantizer rounds weights to, found on a small graph."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.grid import Grid
from splitquant_pt2e.annotation import input_spec, resolved
from splitquant_pt2e.layers import layer_calls
from splitquant_pt2e.observed_grid import grid_of_spec
from splitquant_pt2e.stock_quantizers import make


def stock_grid(name: str) -> Grid:
    """Return the grid of a stock quantizer's weights; ConfigError where none is linear, or it takes no weights."""
    quantizer = make(name)
    torch_state = torch.random.get_rng_state()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8)).eval()
    torch.random.set_rng_state(torch_state)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export's own
        exported = torch.export.export(model, (torch.ones(2, 3, 5, 5),), strict=True).module(check_guards=False)
        graph = quantizer.transform_for_annotation(exported) or exported
        quantizer.annotate(graph)
    found = [(resolved(input_spec(call.node, call.weight)), call.axis) for call in layer_calls(graph)]
    try:
        grids = [grid_of_spec(spec, axis) for spec, axis in found if spec is not None]
    except ConfigError as error:
        raise ConfigError(f"stock quantizer {name!r} rounds weights to a grid that cannot be told: {error}") from error
    if not grids:
        raise ConfigError(f"stock quantizer {name!r} quantizes no weight of a convolution or Linear")
    return grids[-1]
