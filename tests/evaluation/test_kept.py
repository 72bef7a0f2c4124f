"""Items that are made once while they fit into memory, and again where they do not."""

from __future__ import annotations

import pytest
import torch

from splitquant_plugins.evaluation.kept import Kept


def test_what_fits_is_made_once_and_the_rest_again() -> None:
    made = []

    def make(number: int) -> dict[str, torch.Tensor]:
        made.append(number)
        return {"x": torch.full((4,), number)}  # 32 bytes

    items = Kept(3, make, most=70)
    for _ in range(2):
        assert [int(item["x"][0]) for item in items] == [0, 1, 2]
    assert made == [0, 1, 2, 2]
    assert int(items[-1]["x"][0]) == 2
    assert len(items[1:]) == 2
    with pytest.raises(IndexError):
        items[3]
