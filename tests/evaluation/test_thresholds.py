"""Thresholds that fail a comparison: which rows are judged, and in which units."""

from __future__ import annotations

import pytest

from splitquant_plugins.errors import ConfigError
from splitquant_plugins.evaluation.thresholds import Threshold, failures, parse_thresholds

PLAIN = {"backend": "quanto", "weights": "int2", "split": "none", "values": "rtn", "seed": 0, "accuracy": 0.25}
PLAIN["logit_sqnr_db"] = 3.0
SPLIT = {**PLAIN, "split": "auto", "accuracy": 0.8, "logit_sqnr_db": 12.0}


def test_split_rows_are_judged_and_plain_ones_only_alone() -> None:
    gate = parse_thresholds(["accuracy=50"])
    assert failures(gate, [PLAIN, SPLIT]) == []
    (line,) = failures(gate, [PLAIN])
    assert line == "quanto int2 split none, seed 0: accuracy 25.00 % is below 50 %"
    assert len(failures(gate, [PLAIN, SPLIT, {**SPLIT, "seed": 1, "accuracy": 0.4999}])) == 1


def test_decoupleq_rows_are_judged_where_none_is_split() -> None:
    gate = parse_thresholds(["accuracy=50"])
    solved = {**PLAIN, "values": "decoupleq", "accuracy": 0.6}
    assert failures(gate, [PLAIN, solved]) == []
    assert len(failures(gate, [PLAIN, {**solved, "accuracy": 0.4}])) == 1
    assert failures(gate, [PLAIN, {**solved, "accuracy": 0.4}, SPLIT]) == []


def test_units_and_limits() -> None:
    assert parse_thresholds(["accuracy = 80", "logit_sqnr_db=-3.5"]) == [
        Threshold("accuracy", 80.0),
        Threshold("logit_sqnr_db", -3.5),
    ]
    assert failures(parse_thresholds(["accuracy=80", "logit_sqnr_db=12"]), [SPLIT]) == []
    assert len(failures(parse_thresholds(["accuracy=80.1", "logit_sqnr_db=12.1"]), [SPLIT])) == 2
    assert failures(parse_thresholds(["accuracy=1"]), [{**SPLIT, "accuracy": float("nan")}])


@pytest.mark.parametrize(
    "given", [["0.9"], ["f1=3"], ["accuracy=high"], ["accuracy=nan"], ["accuracy=1", "accuracy=2"]]
)
def test_what_is_no_threshold_is_an_error(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--fail-below"):
        parse_thresholds(given)
