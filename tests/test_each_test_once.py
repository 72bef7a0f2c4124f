"""What passed in one environment is left out of the next only where that is safe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = "pytester"
ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import importlib.util, subprocess, sys
import pytest

@pytest.fixture(scope="module")
def found():
    return importlib.util.find_spec("a_package_that_is_missing")

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.importorskip("a_package_that_is_missing")
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
def test_looks(): assert importlib.util.find_spec("a_package_that_is_missing") is None
def test_tries():
    with pytest.raises(ImportError):
        import a_package_that_is_missing
def test_starts_a_process(): subprocess.run([sys.executable, "-c", "pass"])
def test_has_a_fixture(found): pass
def test_has_it_too(found): pass
@pytest.mark.parametrize("number", [1, 2])
def test_numbers(number): assert number == 1
"""
SAFE = ["tests/test_one.py::test_numbers[1]", "tests/test_one.py::test_passes"]


@pytest.fixture
def checkout(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / "conftest.py").read_text("utf-8"))
    (pytester.mkdir("tests") / "test_one.py").write_text(TESTS, "utf-8")
    looks = "import importlib.util\nHAS = importlib.util.find_spec('a_package_that_is_missing')\ndef test(): pass\n"
    (pytester.path / "tests" / "test_other.py").write_text(looks, "utf-8")
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\naddopts = '-p no:cacheprovider'")
    return pytester


@pytest.mark.parametrize("processes", [0, 2])
def test_only_what_passes_and_needs_nothing_more_is_left_out(
    checkout: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory, processes: int
) -> None:
    noted = tmp_path_factory.mktemp("noted") / "passed.json"
    checkout.runpytest("--note-passed", noted, "-n", processes, "tests").assert_outcomes(
        passed=8, failed=2, skipped=1, xfailed=1
    )
    assert json.loads(noted.read_text("utf-8"))["passed"] == SAFE

    rest = checkout.runpytest("--leave-out-passed", noted, "tests")
    rest.assert_outcomes(passed=6, failed=2, skipped=1, xfailed=1, deselected=len(SAFE))
    rest.stdout.fnmatch_lines(["left out: 2 tests that passed in `core` on these sources"])

    (checkout.path / "tests" / "more.txt").write_text("changed", "utf-8")
    changed = checkout.runpytest("--leave-out-passed", noted, "tests")
    changed.assert_outcomes(passed=8, failed=2, skipped=1, xfailed=1, deselected=0)
    changed.stdout.fnmatch_lines(["every test runs: *"])


def test_without_a_list_every_test_runs(checkout: pytest.Pytester) -> None:
    result = checkout.runpytest("--leave-out-passed", "no-such-file", "tests")
    result.assert_outcomes(passed=8, failed=2, skipped=1, xfailed=1, deselected=0)


def test_sources_that_change_meanwhile_leave_no_list(checkout: pytest.Pytester) -> None:
    changes = "from pathlib import Path\ndef test(): Path(__file__).with_name('new.txt').write_text('new')\n"
    (checkout.path / "tests" / "test_changes.py").write_text(changes, "utf-8")
    checkout.runpytest("--note-passed", "passed.json", "tests/test_changes.py").assert_outcomes(passed=1)
    assert not (checkout.path / "passed.json").exists()
