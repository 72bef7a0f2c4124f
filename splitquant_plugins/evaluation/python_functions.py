"""FILE.py:FUNCTION: what a function of the user's own file returns. Only files that the user names are run."""

from __future__ import annotations

import importlib.util
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from splitquant_plugins.errors import InputError, first_line

_ran: dict[Path, tuple[float, ModuleType]] = {}


def split_function(source: str) -> tuple[Path, str] | None:
    """Return file and function where `source` is FILE.py:FUNCTION; None where it is anything else."""
    path, colon, function = source.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def path_of(source: str) -> str:
    """The file of FILE.py:FUNCTION; any other source as it is."""
    found = split_function(source)
    return source if found is None else str(found[0])


def call_function(source: str) -> Any:
    """Run the file of FILE.py:FUNCTION, once for all its functions, and return what the function returns.

    It is called without arguments. Raises InputError for a file or a function that is not there, and for whatever the
    user's code raises.
    """
    found = split_function(source)
    if found is None:
        raise InputError(f"{source}: write FILE.py:FUNCTION")
    path, function = found
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        module = _module_of(path)
        called = getattr(module, function, None)
        if not callable(called):
            raise InputError(f"{path} has no function {function!r}; it has {', '.join(_functions(module)) or 'none'}")
        return called()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InputError(f"{path}:{function}() fails: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.pop(0)


def _module_of(path: Path) -> ModuleType:
    whole = path.resolve()
    changed = whole.stat().st_mtime
    known = _ran.get(whole)
    if known is not None and known[0] == changed:
        return known[1]
    # A name of its own, so that a file called json.py stands in nobody's way; dataclasses and pickles look it up.
    name = f"splitquant_file_{whole.stem}_{sha256(str(whole).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _ran[whole] = (changed, module)
    return module


def _functions(module: ModuleType) -> list[str]:
    """The functions and classes that the file itself defines."""
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return [name for name in own if callable(getattr(module, name)) and not name.startswith("_")]
