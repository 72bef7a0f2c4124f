import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("optimum.commands.optimum_cli")


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess:
    call = f"import sys; from optimum.commands.optimum_cli import main; sys.argv[1:] = {list(arguments)!r}; main()"
    return subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)


def test_the_subcommand_is_registered_and_hands_on_its_arguments() -> None:
    assert find_spec("optimum.commands.register.register_splitquant") is not None
    listed = optimum_cli("splitquant", "plugins")
    assert listed.returncode == 0, listed.stderr
    assert "quanto" in listed.stdout


def test_bad_input_keeps_its_exit_status() -> None:
    failed = optimum_cli("splitquant", "compare", "/no/such/model", "--data", "/no/such.csv")
    assert failed.returncode == 2
    assert "no such model" in failed.stderr
