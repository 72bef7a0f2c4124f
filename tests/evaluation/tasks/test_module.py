"""Any module: what its functions may return, and what is wrong with what they do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitquant_plugins.backends import WeightRequest, run_of
from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.compare import Run, row_of
from splitquant_plugins.evaluation.simulated_backend import SimulatedBackend
from splitquant_plugins.evaluation.subject import Subject, load_task_subject
from splitquant_plugins.evaluation.tasks.module import Module


def measured(file: Path, data: str, limit: int | None = None) -> Subject:
    return load_task_subject(Module(f"{file}:load"), f"{file}:{data}", limit)


def test_inputs_with_and_without_labels_by_position_and_by_name(module_file: Path) -> None:
    assert measured(module_file, "test").figures == {"accuracy": 1.0, "agreement": 1.0, "logit_sqnr_db": 300.0}
    assert measured(module_file, "inputs").figures["accuracy"] is None
    by_name = measured(module_file, "by_name")
    assert by_name.figures["accuracy"] is not None
    assert list(by_name.examples.batches[0]) == ["x"]
    few = measured(module_file, "test", 7)
    assert (few.examples.count, few.figures["accuracy"]) == (7, 1.0)
    assert few.ignore is None


def test_many_inputs_are_cut_into_batches_of_nearly_one_size(module_file: Path) -> None:
    module_file.write_text(module_file.read_text() + "\ndef many():\n    return torch.zeros(129, 3, 4, 4)\n")
    batches = Module(f"{module_file}:load").examples(f"{module_file}:many").batches
    assert [len(batch["x"]) for batch in batches] == [65, 64]


def test_calibration_takes_inputs_and_no_labels(module_file: Path) -> None:
    task = Module(f"{module_file}:load")
    assert task.example_batch(task.load_model()) is None
    (batch,) = task.calibration(f"{module_file}:test", 5)
    assert batch["x"].shape == (5, 3, 8, 8)
    example = task.example_batch(task.load_model())
    assert example is not None
    assert torch.equal(example["x"], batch["x"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("few_labels", "returns 20 inputs and 2 labels"),
        ("high_labels", "label 9 is none of the model's 4 classes"),
        ("float_labels", "labels are whole numbers"),
        ("two_inputs", "returns 2 inputs, which .* does not take: too many positional arguments"),
        ("uneven", "inputs of 3, 20 rows do not go together"),
        ("empty", "inputs without rows"),
        ("text", r"text\(\) has to return inputs, or a pair"),
        ("load", r"load\(\) has to return inputs, or a pair"),
        ("wrong_size", "cannot be run on .*wrong_size: Given groups=1"),
    ],
)
def test_data_that_are_none(data: str, message: str, module_file: Path) -> None:
    with pytest.raises(InputError, match=message):
        measured(module_file, data)


def test_models_and_data_that_are_none(module_file: Path) -> None:
    with pytest.raises(InputError, match=r"inputs\(\) returns a Tensor: it has to return a torch.nn.Module"):
        Module(f"{module_file}:inputs").load_model()
    with pytest.raises(InputError, match=r"give FILE.py:FUNCTION, not texts.csv"):
        Module(f"{module_file}:load").examples("texts.csv")


def test_a_module_that_takes_inputs_without_names(module_file: Path) -> None:
    text = (
        "class Any(nn.Module):\n    def forward(self, *xs):\n        return xs[0]\ndef anything():\n    return Any()\n"
    )
    module_file.write_text(module_file.read_text() + text)
    with pytest.raises(InputError, match="takes its input 'xs' without a name"):
        Module(f"{module_file}:anything").examples(f"{module_file}:inputs")


def test_a_module_that_writes_into_its_inputs_gets_the_same_ones_each_time(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        """
import torch


class Net(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.add_(1))


def load():
    return Net(3, 2)


def test():
    return torch.randn(5, 3)
"""
    )
    task = Module(f"{file}:load")
    subject = load_task_subject(task, f"{file}:test")
    assert subject.measure(run_of(task.load_model()))["logit_sqnr_db"] == 300.0
    batches = task.calibration(f"{file}:test")
    run_of(task.load_model())(batches[0])
    assert torch.equal(batches[0]["x"], task.example_batch(task.load_model())["x"])


def test_a_module_without_a_layer_to_quantize_is_said_to_be_one() -> None:
    form = SimulatedBackend().resolve(WeightRequest("int4"))
    with pytest.raises(InputError, match="simulated finds no layer to quantize in ReLU"):
        SimulatedBackend().quantize(torch.nn.ReLU(), form)


def test_a_quantized_module_that_cannot_be_run_is_said_to_be_one(module_file: Path) -> None:
    class Narrow(SimulatedBackend):
        def quantize(self, *arguments: Any, **options: Any) -> Any:
            def run(batch: Any) -> Any:
                raise TypeError("only for 8 bits")

            return replace(super().quantize(*arguments, **options), run=run)

    backend = Narrow()
    run = Run(backend, backend.resolve(WeightRequest("int4")), "none", 0, None)
    with pytest.raises(InputError, match="simulated int4 none rtn: the quantized model cannot be run: only for 8 bits"):
        row_of(measured(module_file, "test"), run)
