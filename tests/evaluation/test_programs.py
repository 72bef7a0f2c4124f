"""What is said of a program, on outputs small enough to work out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins import Manifest, SplitConfig, SplitQuantPass
from splitquant_plugins.evaluation.programs import program_row
from splitquant_plugins.manifest import LayerRecord

# The largest value of each row is where the float model has it in the first batch, and elsewhere in the second.
FLOAT = [torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
PROGRAM = [torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0]])]


class Answers(nn.Module):
    """Answers batch by batch."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, number: Tensor) -> Tensor:
        return self.outputs[int(number)] * self.weight


BATCHES = [(torch.tensor(number),) for number in range(2)]


class Backend:
    """Changes what it is given, as backends may."""

    def __init__(self, manifest: Manifest | None) -> None:
        self.manifest = manifest
        self.asked: list[Any] = []

    def program(self, model: nn.Module, target: str, first: Any, batches: Any) -> SimpleNamespace:
        self.asked = [target, first, batches]
        nn.init.zeros_(model.weight)
        return SimpleNamespace(
            model=Answers(PROGRAM),
            manifest=self.manifest,
            content=b"12345",
            cycles=7,
            delegates=2,
            host={"add": 3, "mul": 4},
        )


@pytest.mark.parametrize("first", [None, SplitQuantPass(k=2, splitter="kmeans")])
def test_a_row(first: SplitQuantPass | None) -> None:
    layers = [LayerRecord(name=name, kind="linear", action="split") for name in "ab"]
    backend = Backend(None if first is None else Manifest(config=SplitConfig(), layers=layers))
    subject = SimpleNamespace(name="answers", model=Answers(FLOAT), batches=BATCHES)
    program, row = program_row(backend, subject, "board", first)
    assert backend.asked == ["board", first, BATCHES]
    assert program.content == b"12345"
    assert subject.model.weight.item() == 1
    seconds = row.pop("seconds")
    assert 0 <= seconds < 60
    assert row.pop("output_sqnr_db") == pytest.approx(10 * math.log10((1 + 9 + 4 + 1) / (1 + 1)))
    assert row == {
        "model": "answers",
        "target": "board",
        "split": "none" if first is None else "kmeans",
        "k": 1 if first is None else 2,
        "layers_split": 0 if first is None else 2,
        "bytes": 5,
        "cycles": 7,
        "delegates": 2,
        "host_operators": 7,
        "host": {"add": 3, "mul": 4},
        "agreement": 2 / 3,
        "n": 3,
    }
