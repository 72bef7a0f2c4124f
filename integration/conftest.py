"""Where models and data come from: SPLITQUANT_ASSETS, else the Hub, else the tests skip with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitquant_plugins.compare import Subject, load_subject
from splitquant_plugins.errors import SplitQuantError

TASKS = {
    "emotion": ("bert-tiny-emotion", "emotion/test.csv", "gokuls/BERT-tiny-emotion-intent", "dair-ai/emotion"),
    "sms": (
        "bert-tiny-sms-spam",
        "sms_spam/train.csv",
        "mrm8488/bert-tiny-finetuned-sms-spam-detection",
        "ucirvine/sms_spam",
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cell", default="", help="run one cell of the matrix, for example quanto-int2")


def locate(task: str) -> tuple[str, str]:
    """Model and data of a task: paths under SPLITQUANT_ASSETS where it is set, Hub ids otherwise."""
    model, data, model_id, data_id = TASKS[task]
    assets = os.environ.get("SPLITQUANT_ASSETS")
    if assets:
        return str(Path(assets, "models", model)), str(Path(assets, "datasets", data))
    return model_id, data_id


@pytest.fixture(scope="session")
def subjects() -> dict[str, Subject]:
    return {}


@pytest.fixture
def subject(task: str, subjects: dict[str, Subject]) -> Subject:
    if task not in subjects:
        model, data = locate(task)
        try:
            subjects[task] = load_subject(model, data)
        except SplitQuantError as error:
            if os.environ.get("SPLITQUANT_ASSETS"):
                raise
            pytest.skip(f"SPLITQUANT_ASSETS is not set and the Hub gives no {task}: {error}")
    return subjects[task]
