"""The workflows: every job is an environment of tox, and the users' gate is a command that there is."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest

from splitquant_plugins.cli.compare import compare
from splitquant_plugins.evaluation.thresholds import parse_thresholds

ROOT = Path(__file__).resolve().parent.parent
yaml = pytest.importorskip("yaml")


def test_jobs_are_the_environments_of_tox() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    rows = workflow["jobs"]["tox"]["strategy"]["matrix"]["include"]
    jobs = {name for row in rows for name in row["environment"].split(",")}
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    listed = tox["tox"]["env_list"].split()
    pythons = re.findall(r"py\{([\d,]+)\}-core", " ".join(listed))[0].split(",")
    listed = [name for name in listed if "{" not in name] + [f"py{python}-core" for python in pythons]
    own = {name.removeprefix("testenv:") for name in tox.sections()}
    assert jobs >= set(listed) - {"matrix"}  # which needs models and data that are not in the repository
    assert jobs - set(listed) <= own
    for row in rows:
        for name in re.findall(r"py(\d)(\d+)-", row["environment"]):
            assert row["python"] == ".".join(name)


def test_the_gate_of_the_document_is_a_command_that_there_is() -> None:
    text = (ROOT / "docs" / "ci.md").read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 25
    steps = yaml.safe_load(block)["jobs"]["compare"]["steps"]
    (command,) = [step["run"] for step in steps if "splitquant compare" in step.get("run", "")]
    arguments = shlex.split(command.replace("${{ matrix.backend }}", "quanto").replace("${{ matrix.weights }}", "int2"))
    parsed = compare.make_context("compare", arguments[2:]).params
    assert len(parse_thresholds(parsed["thresholds"])) == 2
    assert str(parsed["json_path"]) == "rows.json"
