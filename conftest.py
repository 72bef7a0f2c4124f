"""Each test once: what passed in tox's environment `core` is left out of `backends`, which comes after it.

`--note-passed FILE` writes down which tests passed, and `--leave-out-passed FILE` leaves them out. A test is noted only
if it can do nothing else where more is installed: it looked for no package that is missing, and started no process,
which might have. The list holds for the sources that it was made from. Without such a list every test runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent
SOURCES = ("splitquant_plugins", "adapters", "tests", "integration", "benchmarks", "docs", "examples")
PROCESSES = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec")
DEPENDS = "depends on what is installed"
PHASES = 3  # setup, call, teardown


def digest_of_sources(root: Path = ROOT) -> str:
    """Return a digest of Python's version and of all files that tests are about, with their names."""
    files = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    for folder in SOURCES:
        files += [path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)} ".encode() + content)
    return digest.hexdigest()


class Lookout:
    """Counts looks for missing packages, as the last of Python's finders, and starts of processes, as its auditor."""

    def __init__(self) -> None:
        self.seen = 0
        self.on = True
        sys.meta_path.append(self)
        sys.addaudithook(self._audit)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Count a package that no other finder has found."""
        self.seen += "." not in name

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in PROCESSES:
            self.seen += 1

    def stop(self) -> None:
        """Count no more: an auditor cannot be removed."""
        self.on = False
        sys.meta_path.remove(self)


class NotePassed:
    """Notes what passed. The processes of xdist watch, and the first process gets their reports and writes the list."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.path, self.writes = path, not hasattr(config, "workerinput")
        self.digest = digest_of_sources() if self.writes else ""
        self.lookout = Lookout()
        self.before = 0
        self.depending: set[object] = set()  # modules and fixtures that looked
        self.phases: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        """Remember a file whose import looks."""
        before = self.lookout.seen
        report = yield
        if self.lookout.seen > before:
            self.depending.add(collector)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """Remember a fixture that looks, as several tests may share it."""
        before = self.lookout.seen
        result = yield
        if self.lookout.seen > before:
            self.depending.add(fixturedef.argname)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        """Watch the next test."""
        self.before = self.lookout.seen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Mark a test that looked, or whose file or fixtures did."""
        names = [*item.listchain(), *getattr(item, "fixturenames", ())]
        if self.lookout.seen > self.before or not self.depending.isdisjoint(names):
            item.user_properties.append((DEPENDS, True))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the phases of a test that passed, and were watched without a find."""
        depends = (DEPENDS, True) in map(tuple, report.user_properties)
        self.phases[report.nodeid] += report.passed and not hasattr(report, "wasxfail") and not depends

    def pytest_sessionfinish(self) -> None:
        """Write the list, if this is the process that has it all, and if nothing changed meanwhile."""
        self.lookout.stop()
        if self.writes and self.digest == digest_of_sources():
            passed = sorted(test for test, phases in self.phases.items() if phases == PHASES)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps({"sources": self.digest, "passed": passed}), "utf-8")
            unfinished.replace(self.path)


class LeaveOutPassed:
    """Leaves out what another environment has passed, on the same sources."""

    def __init__(self, path: Path) -> None:
        noted = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.passed = set(noted["passed"]) if noted.get("sources") == digest_of_sources() else set()

    def pytest_report_header(self) -> str:
        """Say what is left out."""
        if not self.passed:
            return "every test runs: no list of what passed in `core` on these sources"
        return f"left out: {len(self.passed)} tests that passed in `core` on these sources"

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests of the list."""
        left_out = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in self.passed]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("each test once")
    group.addoption("--note-passed", type=Path, help="write the tests that pass to this file")
    group.addoption("--leave-out-passed", type=Path, help="leave out the tests of this file, if it is of these sources")


def pytest_configure(config: pytest.Config) -> None:
    """Do what the options say."""
    if config.option.note_passed:
        config.pluginmanager.register(NotePassed(config, config.option.note_passed))
    if config.option.leave_out_passed:
        config.pluginmanager.register(LeaveOutPassed(config.option.leave_out_passed))
