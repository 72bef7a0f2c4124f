"""Pages are whole by themselves, and nothing that comes from outside is markup in them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from splitquant_plugins.evaluation.pages.compare_page import compare_page
from splitquant_plugins.evaluation.pages.inspect_page import inspect_page
from splitquant_plugins.evaluation.tables import compare_columns, decibel, text

EVIL = "<script>alert('x')</script>&\""
VOID = ("meta",)


class Checked(HTMLParser):
    """Notes every element and that all are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def row(split: str, **more: Any) -> dict[str, Any]:
    whole = {"layer": f"stays {EVIL}", "chosen": "whole", "k": 1, "why": f"because {EVIL}"}
    return {
        **{"backend": "quanto", "quantizer": None, "weights": "int2", "granularity": "channel", "group_size": None},
        **{"scheme": "affine", "split": split, "method": "rtn", "k": 3, "seed": 0, "fp32_accuracy": 0.9},
        **{"accuracy": 0.3 if split == "none" else 0.8, "agreement": 0.5, "logit_sqnr_db": 9.0, "kl": None},
        **{"linear_disk_bits_per_weight": 2.5 if split == "none" else 6.0, "weight_sqnr_db": 7.0, "perplexity": None},
        **{"linear_bits_per_weight": 2.5, "linear_bytes": 100, "model_bytes": 900, "split_seconds": 0.1},
        **{"quantize_seconds": 0.2, "peak_mb": None, "split_share": 0.5, "quantized_share": 0.6, "ignored": []},
        "left_float": [{"tensor": f"embed {EVIL}", "shape": [3, 4], "values": 12, "reason": f"why {EVIL}"}],
        "choices": [] if split == "none" else [whole],
        "layers": [{"layer": f"fc {EVIL}", "weight_sqnr_db": 5.0 if split == "none" else 13.0, "bits_per_weight": 2.5}],
        **more,
    }


def checked(page: str) -> str:
    seen = Checked(page)
    assert set(seen.seen).isdisjoint({"script", "link", "img", "iframe", "object", "a"})
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert "<script" not in page
    assert not re.findall(r"https?://|url\(|@import", page)
    assert "prefers-color-scheme:dark" in page
    assert "width=device-width" in page
    assert "default-src 'none'" in page
    return page


def test_the_page_of_a_comparison() -> None:
    rows = [row("none"), row("auto"), row("grid", accuracy=0.7)]
    page = checked(compare_page(f"model {EVIL}", f"n = 3 {EVIL}", rows, compare_columns(("accuracy",))))
    assert page.count("<circle") == 3
    assert 'class="best"><td>1</td>' in page
    assert 'class="best"><td>2</td>' in page
    assert 'class="best"><td>3</td>' not in page
    assert "because &lt;script&gt;" in page
    assert page.count("fc &lt;script&gt;") == 2  # once for each row that is split
    assert "<td>5.0</td><td>13.0</td>" in page
    assert page.count("<details open>") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kl": 0.5, "perplexity": 3.0, "accuracy": None, "fp32_accuracy": None, "ignored": ["lm_head"]}, "KL to the"),
        ({"accuracy": None, "fp32_accuracy": None}, "Agreement with the float model"),
        ({"accuracy": None, "fp32_accuracy": None, "agreement": None}, "Signal-to-noise ratio of the outputs"),
    ],
)
def test_the_quality_is_that_of_the_kind_of_model(more: dict[str, Any], said: str) -> None:
    measures = ("perplexity",) if more.get("kl") else ("accuracy",)
    page = checked(compare_page("m", "s", [row("none", **more), row("auto", **more)], compare_columns(measures)))
    assert said in page
    assert ("lm_head stays float" in page) == ("ignored" in more)


def test_the_page_of_an_inspection() -> None:
    one = {"layer": f"fc {EVIL}", "reason": f"too small {EVIL}"}
    for grid in ("channel", "tensor"):
        one |= {f"{grid}_plain_db": 4.0, f"{grid}_split_db": 12.0}
        one |= {f"{grid}_plain_bits_per_weight": 2.2, f"{grid}_split_bits_per_weight": 6.6}
    columns = (("layer", "layer", text), ("channel_split_db", "dB", decibel))
    page = checked(inspect_page(f"t {EVIL}", "s", [one], columns, {"lm_head": f"the head {EVIL}"}))
    assert page.count("<circle") == 2
    assert "too small &lt;script&gt;" in page
    assert "the head &lt;script&gt;" in page
    steps = [{"layer": EVIL, "k": k, "bits_per_weight": 2.0 * k, "weight_sqnr_db": 3.0 * k} for k in (1, 2, 3)]
    assert checked(inspect_page("t", "s", [one], columns, {}, steps)).count("<circle") == 3
