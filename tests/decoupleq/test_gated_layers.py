"""Layers whose outputs are multiplied with others' on their way make up for what those have lost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import DecoupleQPass, UniformGrid, manifest_of
from splitquant_plugins.decoupleq.asymmetric_calibration import FloatInputs, asymmetric_target, iter_paired_moments
from splitquant_plugins.decoupleq.capture import BlockInputs
from splitquant_plugins.decoupleq.gated_layers import gated_layers

GRID = UniformGrid(2, "affine", "channel")
QUICK: dict[str, Any] = {"rounds": 1, "starts": (1.0,), "search_inputs": 0, "coupled_rows": False}


class Gated(nn.Module):
    """A gated feed-forward layer of width 8 to 12; `plus` is added behind the product."""

    def __init__(self, *, up_first: bool = False) -> None:
        super().__init__()
        self.up_first = up_first
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)
        self.plus, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.up_first:
            up, gate = self.up(x), self.gate(x)
        else:
            gate, up = self.gate(x), self.up(x)
        return x + self.down(torch.nn.functional.silu(gate) * up + 0.3 * self.plus(x))


class Plain(nn.Module):
    """Feeds its layers one after the other, and turns values around between tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(torch.relu(self.two(self.one(x)))).flip(1))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_layers_are_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    call = ((torch.randn(5, 3, 8, dtype=dtype),), {})
    for block in (Gated().eval().to(dtype), Gated(up_first=True).eval().to(dtype)):
        assert FloatInputs(block, [call], nullcontext, linear_layers(block), 2**20).added == {"down"}
        assert gated_layers(block, call, linear_layers(block)) == {"up": "down"}
    plain = Plain().eval().to(dtype)
    assert gated_layers(plain, call, linear_layers(plain)) == {}


@pytest.mark.parametrize("chunk", [1 << 24, 100])
def test_the_target_makes_up_for_the_gate(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is the least squares solution of its own products."""
    monkeypatch.setattr("splitquant_plugins.decoupleq.gated_layers._PRODUCTS", chunk)
    torch.manual_seed(0)
    block, x = Gated().eval(), torch.randn(90, 4, 8)
    mask = torch.ones(90, 4, dtype=torch.long)
    mask[:30, 2:] = 0
    layers = linear_layers(block)
    batch = {"x": x, "attention_mask": mask}
    before = FloatInputs(block, BlockInputs.captured(block, block, [batch]).calls, nullcontext, layers, 2**20)
    with torch.no_grad():
        wanted = torch.nn.functional.silu(block.gate(x)) * block.up(x) + 0.3 * block.plus(x)
        assert before.of(0)[0]["down"][0].shape == wanted.shape
        block.gate.weight += 0.2 * torch.randn(12, 8)
    changed = {"x": x + 0.1 * torch.randn(90, 4, 8), "attention_mask": mask}
    now = BlockInputs.captured(block, block, [changed])
    ((name, pair),) = iter_paired_moments(now, before, {"up": block.up}, 2**20)
    assert name == "up"
    assert pair.moment.samples == int(mask.sum())
    target = asymmetric_target(block.up.weight, pair, 1.0, 0.0)
    given = changed["x"][mask.bool()].double()
    with torch.no_grad():
        factor = torch.nn.functional.silu(block.gate(changed["x"]))[mask.bool()].double()
        rest = (0.3 * block.plus(changed["x"]))[mask.bool()].double() + factor * block.up.bias.double()
    for row in range(12):
        solved = torch.linalg.lstsq(factor[:, row, None] * given, (wanted[mask.bool()].double() - rest)[:, row, None])
        torch.testing.assert_close(target[row].double(), solved.solution[:, 0], rtol=1e-3, atol=1e-3)


def test_wide_layers_are_solved_as_others_are() -> None:
    torch.manual_seed(0)
    block, x = Gated().eval(), torch.randn(20, 4, 8)
    layers = linear_layers(block)
    inputs = BlockInputs.captured(block, block, [x])
    for max_bytes, groups in ((32 * 12 * 8 * 8 * 8, 12), (32 * 12 * 8 * 8 * 8 - 1, 1)):
        before = FloatInputs(block, inputs.calls, nullcontext, layers, 2**20)
        found = dict(iter_paired_moments(inputs, before, layers, max_bytes))
        assert list(found)[-1] == "up" or groups == 1
        assert len(found["up"].moment.matrix) == groups
        assert len(found["gate"].moment.matrix) == 1


def test_gated_models_come_out_nearer() -> None:
    """Beside the same with moments of whole layers, on inputs that were not seen."""
    better = 0
    for seed in range(3):
        errors = []
        for limit in (2**30, 1000):
            torch.manual_seed(seed)
            model = nn.Sequential(Gated(), Gated(), Gated()).eval()
            batches, unseen = [torch.randn(16, 8, 8) for _ in range(4)], torch.randn(64, 8, 8)
            with torch.no_grad():
                wanted = model(unseen)
                DecoupleQPass(calibration=batches, calibration_bytes=limit, **QUICK).apply(model, grid=GRID)
                errors.append(float((model(unseen) - wanted).square().mean()))
        assert len(manifest_of(model).solved) == 12
        better += errors[0] < errors[1]
    assert better >= 2


class Experts(nn.Module):
    """Sends each row to one of two gated experts, which a small batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Gated(), Gated()])

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = x[..., 0] > 0, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = chosen == bool(number)
            if bool(rows.any()):
                y[rows] = expert(x[rows])
        return x + y


def test_experts_that_some_batches_leave_out_are_solved_and_few_inputs_are_noted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Experts() for _ in range(3))).eval()
    batches = [torch.randn(8, 4, 8), *(torch.randn(1, 1, 8) for _ in range(6))]
    DecoupleQPass(calibration=batches, **{**QUICK, "coupled_rows": True}).apply(model, grid=GRID)
    assert len(manifest_of(model).solved) == 24
    assert not any("give more calibration data" in note for note in manifest_of(model).notes)
    few = nn.Sequential(Gated(), Gated()).eval()
    DecoupleQPass(calibration=[torch.randn(2, 5, 8)], **QUICK).apply(few, grid=GRID)
    notes = [note for note in manifest_of(few).notes if "give more calibration data" in note]
    assert [note.partition(" are few")[0] for note in notes] == [
        f"{name}.down: 10 calibration inputs for 12 weights per output" for name in (0, 1)
    ]
