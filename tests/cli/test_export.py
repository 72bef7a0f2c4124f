"""`splitquant export`: a table of plain and split, a program on disk, one line per mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitquant_plugins.backends import Program
from splitquant_plugins.cli.main import run
from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend
from splitquant_plugins.grid import UniformGrid

FILE = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(4, 8) for _ in range(3)]
"""


def lower(self: Any, model: nn.Module, target: str, first: Any, batches: Any) -> Program:
    """A compiler of weights in 4 bits; `refused` is a target that takes nothing."""
    if target == "refused":
        raise InputError("the compiler of refused refuses the model: ValueError: too new")
    grid = UniformGrid(4, "symmetric", "tensor")
    if first is not None:
        model = first.apply(model, grid=grid)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(grid.quantize_dequantize(module.weight))
    content = b"split" if first else b"plain"
    manifest = getattr(model, "splitquant_manifest", None)
    return Program(content, 1, {"mean.out": 2}, 1000, model, manifest)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(SimulatedBackend, "targets", lambda self: {"chip": "a chip", "refused": "another"})
    monkeypatch.setattr(SimulatedBackend, "program", lower)
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return f"{path}:load"


def test_plain_and_split_side_by_side(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, rows = tmp_path / "net.pte", tmp_path / "rows.json"
    command = ["export", model, "--backend", "simulated", "--target", "chip", "--output", str(output)]
    assert run([*command, "--json", str(rows)]) == 0
    assert output.read_bytes() == b"split"
    plain, split = json.loads(rows.read_text())
    assert (plain["split"], split["split"], split["k"], split["layers_split"]) == ("none", "auto", 2, 2)
    assert split["output_sqnr_db"] > plain["output_sqnr_db"] + 6
    assert (split["n"], split["cycles"], split["delegates"], split["host_operators"]) == (12, 1000, 1, 2)
    said = capsys.readouterr().out
    assert "left to the host: mean.out (2)" in said
    assert run([*command, "--split", "none"]) == 0
    assert output.read_bytes() == b"plain"
    assert run([*command, "--only", "--json", str(rows)]) == 0
    assert len(json.loads(rows.read_text())) == 1


def test_mistakes_are_one_line(model: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    output = tmp_path / "net.pte"
    command = ["export", model, "--backend", "simulated", "--output", output, "--target"]
    assert "no target 'toaster': choose from chip, refused" in fails(*command, "toaster")
    assert "the compiler of refused refuses the model" in fails(*command, "refused")
    assert not output.exists()
    path = model.rpartition(":")[0]
    same = fails("export", model, "--backend", "simulated", "--target", "chip", "--output", path)
    assert "is an input of this command" in same
