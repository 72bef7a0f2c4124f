"""The walks of CONTRIBUTING are walked: what it says to write is written to a copy of the package, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def files_of(heading: str) -> dict[str, str]:
    """The Python blocks of a section, by what their first line says they are."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```python\n# (\S+?\.py)(.*?)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return {path + remark: content for path, remark, content in found}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the core and of its tests' settings."""
    for name in ("splitquant_plugins", "tests/conftest.py", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path


@pytest.fixture
def write(checkout: Path) -> Callable[[str, str], Path]:
    def write_file(path: str, content: str) -> Path:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(content, "utf-8")
        return checkout / path

    return write_file


@pytest.fixture
def python(checkout: Path, python_path: Callable[..., dict[str, str]]) -> Callable[..., str]:
    """Run Python in the copy, and return what it prints."""

    def run(*arguments: str) -> str:
        environment = {**python_path(checkout, checkout / "adapters"), "COLUMNS": "200"}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_a_splitter_is_added_in_one_file_with_one_test(
    checkout: Path, write: Callable[[str, str], Path], python: Callable[..., str]
) -> None:
    (splitter, code), (line, register), (test, check) = files_of("Add a splitter").items()
    write(splitter, code)
    write(test, check)
    known = checkout / line.partition(",")[0]
    assert known.is_file()
    assert register.count("\n") == 1
    known.write_text(known.read_text("utf-8") + f"    {register}", "utf-8")
    # One process for both, as PyTorch takes seconds to import.
    command = f"""if True:
        import sys
        import pytest
        assert pytest.main(["-q", "-p", "no:cacheprovider", {test!r}]) == 0
        from splitquant_plugins.cli import main
        sys.argv = ["splitquant", "plugins"]
        main()
    """
    printed = python("-c", command)
    assert "1 passed" in printed
    assert re.search(r"kmeans, .*signs", printed)


def test_a_backend_is_added_in_one_folder_and_keeps_the_contract(
    checkout: Path, write: Callable[[str, str], Path], python: Callable[..., str]
) -> None:
    pytest.importorskip("transformers")
    files = files_of("Add a backend")
    assert len({os.path.dirname(path) for path in files if path.startswith("adapters/")}) == 1
    for path, content in files.items():
        write(path, content)
    (entry,) = re.findall(r"^```toml\n(\[project\.entry-points\.splitquant\]\nbytes = .*?)^```", TEXT, re.M | re.S)
    write(
        "adapters/splitquant_bytes-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: splitquant-bytes\nVersion: 1\n"
    )
    write(
        "adapters/splitquant_bytes-1.dist-info/entry_points.txt",
        entry.replace("project.entry-points.", "").replace('"', ""),
    )
    (test,) = (path for path in files if path.startswith("tests/"))
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", test)
    assert int(re.findall(r"(\d+) passed", printed)[0]) >= 9
    assert not re.findall(r"skipped|failed", printed)


def test_the_rooms_of_the_table_are_the_rooms() -> None:
    package = ROOT / "splitquant_plugins"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    (table,) = re.findall(r"^\| room .*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert {room for room in re.findall(r"(\w+)/", table) if (package / room).is_dir()} >= rooms
    for path in re.findall(r"`((?:splitquant_plugins|adapters|tests|integration|benchmarks)/[\w/]*)`", table):
        assert (ROOT / path).is_dir(), path
