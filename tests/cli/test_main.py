"""The command line as a whole: help, one line per error, warnings."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from splitquant_plugins.cli.main import COMMANDS, run
from splitquant_plugins.errors import SplitQuantWarning


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_without_arguments_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Usage: splitquant")
    assert [line.split()[0] for line in lines[-len(COMMANDS) :]] == list(COMMANDS)


@pytest.mark.parametrize("arguments", [["nosuch"], ["compare"], ["--nosuch"]])
def test_a_wrong_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("splitquant: error: ")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that cannot be written")
def test_a_file_that_cannot_be_written_is_named_as_the_user_named_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "--json", "/proc/rows.json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "splitquant: error: /proc/rows.json: No such file or directory"


def test_own_warnings_are_one_line_and_those_of_libraries_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("a layer\nis left whole", SplitQuantWarning, "here.py", 1)
        warnings.showwarning("splitquant is not the one who says this", UserWarning, "there.py", 1)
    assert capsys.readouterr().err == "splitquant: warning: a layer is left whole\n"


def test_the_module_runs_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "splitquant_plugins.cli.main"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "compare" in done.stderr
