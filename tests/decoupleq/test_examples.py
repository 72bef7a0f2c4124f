"""Examples of training: batches cut and joined without a change of what the model makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from splitquant_plugins.decoupleq.examples import examples_of, held_out_of
from splitquant_plugins.errors import InputError


class Rows(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, gain: float = 1.0) -> Tensor:
        return gain * x * (1 if attention_mask is None else attention_mask[..., None])


class Mixed(nn.Module):
    """Every row depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Sequence(nn.Module):
    """One sequence without a batch dimension, and an output of one row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=0, keepdim=True)


def test_batches_are_cut_and_joined_to_the_rows_that_are_wanted() -> None:
    values = torch.arange(66.0).reshape(11, 3, 2)
    batches = [
        {"x": values[:7], "attention_mask": torch.ones(7, 3)},
        {"x": values[7:], "attention_mask": torch.zeros(4, 3)},
    ]
    examples = examples_of(Rows(), batches, 4)
    assert sorted(example.rows for example in examples) == [3, 4, 4]
    order = torch.cat([example.kwargs["x"] for example in examples])
    assert sorted(order[:, 0, 0].tolist()) == sorted(values[:, 0, 0].tolist())
    for example in examples:
        for row, mask in zip(example.kwargs["x"], example.kwargs["attention_mask"], strict=True):
            assert bool((mask == 1).all()) == bool(row[0, 0] < values[7, 0, 0])


def test_batches_of_other_shapes_or_settings_are_not_joined() -> None:
    one = {"x": torch.ones(1, 3, 2)}
    batches = [one, {"x": torch.ones(1, 4, 2)}, {**one, "gain": 2.0}, {**one, "gain": 2.0}, one]
    examples = examples_of(Rows(), batches, 4)
    assert sorted(example.rows for example in examples) == [1, 2, 2]
    assert sorted(example.kwargs.get("gain", 0.0) for example in examples) == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("model", "batch"), [(Mixed(), torch.randn(6, 3)), (Sequence(), torch.randn(6, 3))], ids=["rows mix", "no batch"]
)
def test_batches_stay_whole_where_rows_are_not_alone(model: nn.Module, batch: Tensor) -> None:
    examples = examples_of(model, [batch, batch + 1], 2)
    assert [example.rows for example in examples] == [6, 6]
    assert torch.equal(examples[1].args[0], batch + 1)


def test_a_single_row_without_a_batch_dimension_is_not_joined() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(dim=-1)

    examples = examples_of(Flat(), [torch.randn(1, 3), torch.randn(1, 3)], 4)
    assert [example.rows for example in examples] == [1, 1]


def test_no_batches() -> None:
    with pytest.raises(InputError, match="no calibration batches"):
        examples_of(Rows(), [], 4)


def test_what_is_held_out_is_not_trained_on() -> None:
    examples = examples_of(Rows(), [{"x": torch.randn(50, 3, 2)}], 4)
    trained, held_out = held_out_of(examples, 0.125, seed=0)
    assert sorted([*trained, *held_out]) == list(range(13))
    assert 6 <= sum(examples[place].rows for place in held_out) <= 11
    assert held_out_of(examples, 0.125, seed=1)[1] != held_out
    trained, held_out = held_out_of(examples, 0.999, seed=0)
    assert len(trained) == 1
    assert held_out_of(examples[:1], 0.5, seed=0) == ([0], [0])


def test_no_more_is_held_out_than_judging_takes() -> None:
    examples = examples_of(Rows(), [{"x": torch.randn(1000, 3, 2)}], 4)
    assert sum(examples[place].rows for place in held_out_of(examples, 0.5, seed=0)[1]) == 64
