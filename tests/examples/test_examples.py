"""The examples run as they stand, and what they print is what they find."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # the backends' own


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the `main` of an example as if it was started in its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name, *arguments: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](arguments)


def test_a_bert_in_ten_lines(example: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optimum.quanto")
    errors = example("bert_in_ten_lines")
    assert errors["split"] < errors["plain"] / 2
    assert f"split: logits {errors['split']:.2%} off" in capsys.readouterr().out


def test_a_convolutional_net_for_an_npu(example: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    accuracy = example("convolutional_net_for_an_npu")
    assert accuracy["float"] > 0.9
    assert accuracy["int2, split"] > accuracy["int2, plain"] + 0.3
    assert f"int2, split: {accuracy['int2, split']:.1%} of 1000 images" in capsys.readouterr().out


def test_a_language_model_comes_back_from_disk(example: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optimum.quanto")
    found = example("language_model_and_back_from_disk")
    perplexities = found["perplexity"]
    assert perplexities["INT2, split, from disk"] == perplexities["INT2, split"]
    assert perplexities["float"] < 5
    whole, plain, split = (perplexities[name] for name in ("float", "INT2, plain", "INT2, split"))
    assert abs(split - whole) < abs(plain - whole) / 2
    assert found["before"] == found["after"]
    assert found["after"].startswith("the fox is ")
    assert f"  {found['after']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert_in_ten_lines", "language_model_and_back_from_disk"])
def test_a_model_without_texts_is_an_error(name: str, example: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit):
        example(name, "--model", "somewhere")
