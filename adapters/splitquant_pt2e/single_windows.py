"""Pools with a single window, as in front of a classifier: their stride says nothing, and compilers still ask for it.

`avg_pool2d(x, 8)` of 8 x 8 values has stride 8. Ethos-U55 steps by 3 at most, so its partitioner leaves such a pool to
the host and makes two programs of one; with stride 1 the pool is the same, and it is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule, Node

_AVERAGE = torch.ops.aten.avg_pool2d.default  # input, kernel, stride, padding, ...
_MAXIMUM = torch.ops.aten.max_pool2d.default  # input, kernel, stride, padding, dilation, ...


def step_by_one(model: GraphModule) -> int:
    """Give pools stride 1 along each axis that one window covers, in place; return how many were changed.

    The outputs stay what they are. Nodes have the value's shape in their `meta["val"]`, as `torch.export` leaves them;
    pools of unknown sizes stay.
    """
    changed = 0
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in (_AVERAGE, _MAXIMUM):
            continue
        kernel = _pair(node, 1, ())
        stride = _pair(node, 2, kernel)
        covered = _covered(node, kernel)
        new = [1 if whole else step for whole, step in zip(covered, stride, strict=True)]
        if new != stride:
            node.args = (*node.args[:2], new, *node.args[3:])
            changed += 1
    model.recompile()
    return changed


def _covered(node: Node, kernel: list[int]) -> list[bool]:
    """Whether the window is as long as the padded input, for each of the two axes."""
    sizes = node.all_input_nodes[0].meta["val"].shape[-2:]
    padding = _pair(node, 3, (0, 0))
    dilation = _pair(node, 4, (1, 1)) if node.target is _MAXIMUM else [1, 1]
    return [
        isinstance(size, int) and size + 2 * pad == gap * (length - 1) + 1
        for size, pad, gap, length in zip(sizes, padding, dilation, kernel, strict=True)
    ]


def _pair(node: Node, place: int, default: Sequence[int]) -> list[int]:
    """An argument of two numbers, which one number or, for the stride, none at all may stand for."""
    given = node.args[place] if place < len(node.args) else ()
    values: list[int] = list(given) or list(default)  # type: ignore[arg-type]
    return values * 2 if len(values) == 1 else values
