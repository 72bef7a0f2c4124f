"""What a fused layer costs where quanto made the parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitquant_plugins import SplitQuantPass, fuse

quanto = pytest.importorskip("optimum.quanto")

from splitquant_quanto.quantization import quantize_after  # noqa: E402


class Calls(TorchDispatchMode):
    """The operators that are called, and the classes of what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.classes: set[type] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operator))
        self.classes.update(type(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        return operator(*args, **(kwargs or {}))


def test_a_materialised_layer_asks_nothing_of_the_parts_tensors() -> None:
    # Each operator on a tensor of quanto's takes longer than a small product.
    torch.manual_seed(0)
    model = fuse(quantize_after(SplitQuantPass(k=2), nn.Sequential(nn.Linear(64, 64)).eval(), "int4"))
    inputs = torch.randn(2, 64)
    with torch.no_grad():
        first = model(inputs)
        with Calls() as calls:
            again = model(inputs)
    assert torch.equal(first, again)
    assert calls.classes <= {Tensor, nn.Parameter}
    assert len([name for name in calls.names if "mm" in name]) == 1
