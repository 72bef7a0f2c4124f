"""A pool with a single window gets stride 1, and computes what it did; others keep their strides."""

from __future__ import annotations

import pytest
import torch
from splitquant_pt2e.single_windows import step_by_one
from torch import nn

AVERAGE, MAXIMUM = nn.AvgPool2d, nn.MaxPool2d


def exported(pool: nn.Module, height: int, width: int) -> tuple[torch.export.ExportedProgram, torch.Tensor]:
    images = torch.randn(2, 3, height, width)
    return torch.export.export(pool.eval(), (images,)), images


def stride_of(program: torch.export.ExportedProgram) -> list[int]:
    (pool,) = (node for node in program.graph.nodes if "pool2d" in str(node.target))
    return list(pool.args[2])


@pytest.mark.parametrize("kind", [AVERAGE, MAXIMUM])
@pytest.mark.parametrize(
    ("height", "width", "options", "stride"),
    [
        (8, 8, {"kernel_size": 8}, [1, 1]),
        (8, 8, {"kernel_size": 8, "ceil_mode": True}, [1, 1]),
        (6, 6, {"kernel_size": 8, "padding": 1}, [1, 1]),
        (8, 8, {"kernel_size": (8, 4)}, [1, 4]),
        (8, 6, {"kernel_size": (8, 6), "stride": (5, 7)}, [1, 1]),
    ],
)
def test_a_single_window_steps_by_one(kind, height, width, options, stride) -> None:
    program, images = exported(kind(**options), height, width)
    expected = program.module()(images)
    assert step_by_one(program.graph_module) == 1
    assert stride_of(program) == stride
    torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=0)


def test_dilated_windows_are_longer() -> None:
    program, images = exported(nn.MaxPool2d(4, stride=5, dilation=2), 7, 7)
    expected = program.module()(images)
    assert step_by_one(program.graph_module) == 1
    torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [AVERAGE, MAXIMUM])
@pytest.mark.parametrize(("size", "kernel"), [(8, 4), (9, 8)])  # of the latter stride 1 would make four windows
def test_other_pools_keep_their_strides(kind, size, kernel) -> None:
    program, images = exported(kind(kernel), size, size)
    expected = program.module()(images)
    assert step_by_one(program.graph_module) == 0
    torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=0)


def test_pools_of_unknown_sizes_stay() -> None:
    free = torch.export.Dim.AUTO
    program = torch.export.export(nn.AvgPool2d(8), (torch.randn(2, 3, 16, 16),), dynamic_shapes=({2: free, 3: free},))
    assert step_by_one(program.graph_module) == 0
