"""Records of layers, as the manifest has them."""

from __future__ import annotations

import warnings

import pytest
import torch

from splitquant_plugins import LayerPlan, Manifest
from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import SplitQuantWarning
from splitquant_plugins.manifest import LayerRecord
from splitquant_plugins.passes.record import ignored_record, layer_record, new_manifest, warn_of_harm
from splitquant_plugins.passes.split_layer import Errors, SplitTensors
from splitquant_plugins.plugins import version_of

PLAN = LayerPlan("linear", torch.zeros(4, 6, dtype=torch.float16), torch.zeros(4, dtype=torch.float16))


def tensors(**options: object) -> SplitTensors:
    weight, bias = torch.zeros(4, 6), torch.zeros(4)
    given = {"splitter": "kmeans", "why": "because", "granularity": "channel", "error": Errors(4.0, 1.0), **options}
    return SplitTensors([weight] * 3, [bias, None, bias], 1.5, **given)


def test_the_record_of_a_split_layer() -> None:
    assert layer_record(["a", "b", "c"], PLAN, tensors()) == LayerRecord(
        name="a",
        kind="linear",
        action="split",
        also_known_as=("b", "c"),
        shape=(4, 6),
        dtype="float16",
        granularity="channel",
        splitter="kmeans",
        why="because",
        error_whole=4.0,
        error_split=1.0,
        k=3,
        parts=("lower", "middle", "upper"),
        bias_parts=("lower", "upper"),
        seconds=1.5,
    )


def test_a_layer_that_shares_its_parts_took_no_time_and_one_without_a_grid_has_no_error() -> None:
    record = layer_record(["a"], PLAN, tensors(shared_with="z", error=None))
    assert (record.shared_with, record.seconds) == ("z", 0.0)
    assert (record.error_whole, record.error_split) == (None, None)
    assert record.also_known_as == ()


def test_the_record_of_a_layer_that_stays_whole() -> None:
    expected = LayerRecord(name="a", kind="linear", action="kept", reason="it is round", also_known_as=("b",))
    assert ignored_record(["a", "b"], "it is round", "linear") == expected
    chosen = {"splitter": "kmeans", "why": "because"}
    errors = {"error_whole": 4.0, "error_split": 1.0}
    assert layer_record(["a", "b"], PLAN, tensors(reason="it is round")) == expected.model_copy(
        update={**chosen, **errors}
    )
    found = layer_record(["a", "b"], PLAN, tensors(reason="it is round", error=None))
    assert found == expected.model_copy(update=chosen)


def test_every_part_has_a_place_for_a_bias() -> None:
    with pytest.raises(ValueError, match="shorter"):
        layer_record(["a"], PLAN, SplitTensors([torch.zeros(4, 6)] * 3, [None, None], 0.0))


def test_a_new_manifest_holds_what_it_is_given() -> None:
    config, record = SplitConfig(k=2), ignored_record(["a"], "r", "linear")
    options = {"one": 1}
    made = new_manifest(config, options, iter(["note"]), iter([record]))
    expected = Manifest(
        version=version_of(), config=config, splitter_options={"one": 1}, notes=["note"], layers=[record]
    )
    assert made == expected
    made.splitter_options["two"] = 2
    assert options == {"one": 1}
    empty = new_manifest(config)
    assert (empty.splitter_options, empty.notes, empty.layers) == ({}, [], [])


def harmed(*ratios: float) -> Manifest:
    names = "abcd"
    return new_manifest(
        SplitConfig(),
        layers=[
            layer_record([name], PLAN, tensors(error=Errors(10.0, 10 * ratio)))
            for name, ratio in zip(names, ratios, strict=False)
        ],
    )


def test_splits_that_do_harm_are_warned_of() -> None:
    with pytest.warns(SplitQuantWarning, match=r"2 of 4 split layers lose .* of all c .* 10 whole, 30 split by 'kmea"):
        warn_of_harm(harmed(0.5, 2.0, 3.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_harm(harmed(0.5, 1.0))


def test_the_warning_names_the_line_that_called_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(warnings, "warn", lambda message, kind, *, stacklevel: given.extend([kind, stacklevel]))
    warn_of_harm(harmed(2.0))
    assert given == [SplitQuantWarning, 4]  # warn_of_harm, apply, __call__, the user's line
