"""FILE.py:FUNCTION: one run of the file, and errors that say what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitquant_plugins.errors import InputError
from splitquant_plugins.evaluation.python_functions import call_function, path_of, split_function


def test_only_what_names_a_python_file_and_a_function_is_one() -> None:
    assert split_function("a/net.py:load") == (Path("a/net.py"), "load")
    assert [split_function(each) for each in ("net.py", "org/model", "C:/models/bert", "net.pyc:load")] == [None] * 4
    assert (path_of("a/net.py:load"), path_of("texts.csv")) == ("a/net.py", "texts.csv")


def test_a_file_is_run_once_for_all_its_functions(module_file: Path) -> None:
    assert [len(call_function(f"{module_file}:counts")) for _ in range(3)] == [1, 2, 3]


def test_a_file_that_has_changed_is_run_anew(tmp_path: Path) -> None:
    import os

    path = tmp_path / "json.py"  # in nobody's way
    path.write_text("def f():\n    return 1\n")
    assert call_function(f"{path}:f") == 1
    path.write_text("def f():\n    return 2\n")
    os.utime(path, (1, 1))
    assert call_function(f"{path}:f") == 2
    import json

    assert json.loads("1") == 1


def test_a_file_finds_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_this_one.py").write_text("VALUE = 7\n")
    (tmp_path / "main.py").write_text("from beside_this_one import VALUE\ndef f():\n    return VALUE\n")
    assert call_function(f"{tmp_path / 'main.py'}:f") == 7


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", r"has no function 'absent'; it has Sizes, Net, load, inputs"),
        ("calls", r"has no function 'calls'"),
        ("broken", r"broken\(\) fails: RuntimeError: no data here"),
        ("leaves", r"leaves\(\) fails: SystemExit: 3"),
    ],
)
def test_functions_that_fail_are_named(module_file: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call_function(f"{module_file}:{function}")


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*absent.py"):
        call_function(f"{tmp_path / 'absent.py'}:load")
    (tmp_path / "bad.py").write_text("def load(:\n")
    with pytest.raises(InputError, match="fails: SyntaxError"):
        call_function(f"{tmp_path / 'bad.py'}:load")
