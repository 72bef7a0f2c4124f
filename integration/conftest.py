"""Where models and data come from: SPLITQUANT_ASSETS, else the Hub, else the tests skip with the reason."""

from __future__ import annotations

import os

import pytest
from assets import locate

from splitquant_plugins.errors import SplitQuantError
from splitquant_plugins.evaluation.compare import load_subject
from splitquant_plugins.evaluation.subject import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cell", default="", help="run one cell of the matrix, for example quanto-int2")


@pytest.fixture(scope="session")
def subjects() -> dict[str, Subject]:
    return {}


@pytest.fixture
def subject(task: str, subjects: dict[str, Subject]) -> Subject:
    if task not in subjects:
        model, data = locate(task)
        try:
            subjects[task] = load_subject(model, data, by_length=True)
        except SplitQuantError as error:
            if os.environ.get("SPLITQUANT_ASSETS"):
                raise
            pytest.skip(f"SPLITQUANT_ASSETS is not set and the Hub gives no {task}: {error}")
    return subjects[task]
