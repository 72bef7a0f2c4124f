"""The archives of this checkout, and an environment that has the wheel and what it asks for, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What would let the checkout, or another environment, into the one that is tested.
INHERITED = ("PYTHON", "NUMBA", "VIRTUAL_ENV", "SPLITQUANT", "COV_")


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints, in an environment without our paths; a failure says what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the sdist and of the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def sdist(archives: Path) -> Path:
    """Return the source distribution."""
    (path,) = archives.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel(archives: Path) -> Path:
    """Return the wheel."""
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Install the wheel in a new environment; return what runs a program of it, far from the checkout."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", home / "environment", cwd=home)
    programs = home / "environment" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel, cwd=home)
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()

    def program(name: str, *arguments: str | Path) -> str:
        return run(programs / name, *arguments, cwd=elsewhere)

    return program
