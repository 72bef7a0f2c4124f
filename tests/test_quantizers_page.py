"""The page of stock quantizers is what was measured, with the versions that are tested together."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from splitquant_pt2e.stock_quantizers import STOCK

ROOT = Path(__file__).resolve().parent.parent
STORED = json.loads((ROOT / "docs" / "backends" / "quantizers.json").read_text("utf-8"))
PAGE = (ROOT / "docs" / "backends" / "quantizers.md").read_text("utf-8")


def test_the_page_is_written_from_what_was_measured() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "stock_quantizers.py"))
    assert benchmark["render"](STORED) == PAGE


def test_figures_are_of_the_versions_that_are_tested_together() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    assert {"torch", "torchao", "executorch"} <= set(STORED["versions"])
    assert {name: pinned[name] for name in STORED["versions"] if name in pinned}.items() <= STORED["versions"].items()


def test_rows_are_quantizers_that_there_are_in_their_order() -> None:
    names = [row["quantizer"] for row in STORED["rows"]]
    assert names == [name for name in STOCK if name in names]
    assert [row["description"] for row in STORED["rows"]] == [STOCK[name].description for name in names]
    assert len(names) >= 20


@pytest.mark.parametrize("row", STORED["rows"], ids=lambda row: row["quantizer"])
def test_the_default_split_is_never_worse_than_plain(row) -> None:
    assert row["auto"]["logit_sqnr_db"] > row["plain"]["logit_sqnr_db"] - 0.3
    for key in ("delegates", "host_operators"):
        if key in row["auto"] and row["auto"]["delegates"]:
            assert row["auto"][key] <= row["plain"][key]
