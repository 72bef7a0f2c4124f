"""Tensors are held in memory up to a number of bytes, and in files beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitquant_plugins.streaming.spilled import Kept, Spill, loaded


def test_what_fits_exactly_stays_in_memory(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 24)
    assert spill.bytes == 0
    first, second = torch.randn(2), torch.randn(4)
    kept = [spill.keep(first), spill.keep(second)]
    assert spill.bytes == 24
    assert not list(tmp_path.iterdir())
    assert kept[0].get() is first
    assert kept[1].get() is second

    over = spill.keep(torch.ones(1, dtype=torch.int8))
    assert isinstance(over.place, Path)
    assert over.spill is spill
    assert spill.bytes == 24
    assert torch.equal(over.get(), torch.ones(1, dtype=torch.int8))


def test_room_that_is_given_back_is_used_again(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 16)
    kept = spill.keep(torch.randn(4))
    assert isinstance(spill.keep(torch.randn(4)).place, Path)
    kept.drop()
    assert spill.bytes == 0
    half = spill.keep(torch.randn(2))
    assert spill.bytes == 8
    rest = spill.keep(torch.randn(2))
    half.drop()
    assert spill.bytes == 8
    assert rest.place is rest.get()


def test_every_tensor_has_a_file_of_its_own(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 0)
    tensors = [torch.randn(3, 2).t(), torch.randn(4, requires_grad=True), torch.zeros(2, dtype=torch.bfloat16)]
    kept = [spill.keep(tensor) for tensor in tensors]
    assert len(list(tmp_path.iterdir())) == 3
    for tensor, each in zip(tensors, kept, strict=True):
        found = each.get()
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert not found.requires_grad
    kept[1].drop()
    kept[1].drop()  # nothing is left to let go of
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(kept[2].get(), tensors[2])
    assert spill.bytes == 0


def test_a_tensor_comes_back_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    class Elsewhere(torch.Tensor):
        device = property(lambda tensor: torch.device("meta"))

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    spill = Spill(tmp_path, 0)
    assert spill.keep(torch.randn(2).as_subclass(Elsewhere)).device == "meta"
    asked = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: asked.append(device) or to(tensor, device))
    kept = spill.keep(torch.randn(2))
    Kept(spill, kept.place, "meta").get()
    kept.get()
    Kept(spill, kept.place).get()
    assert asked == ["meta", "cpu", "cpu"]


@pytest.mark.parametrize("memory", [0, 100])
def test_a_nest_is_loaded_whole(tmp_path: Path, memory: int) -> None:
    spill = Spill(tmp_path, memory)
    tensor = torch.randn(2)
    found = loaded({"a": [spill.keep(tensor), 3], "b": (None, "text", tensor)})
    assert torch.equal(found["a"][0], tensor)
    assert found["a"][1] == 3
    assert found["b"] == (None, "text", tensor)
