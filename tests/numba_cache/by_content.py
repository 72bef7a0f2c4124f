"""What numba compiled, kept by what the sources say and not by where they lie.

tox installs the package into several environments, and tests copy it: all of these share what one has compiled. numba
imports this class by the name in NUMBA_CACHE_LOCATOR_CLASSES, and keeps the rest of what it compiles as always.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core import config
from numba.core.caching import UserProvidedCacheLocator

MARK = b"splitquant_plugins.compiled import compiled"


@functools.cache
def digest_of_kernels(package: Path) -> str:
    """Return a digest of all files with compiled functions, as they call one another, and of what compiles them."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        if MARK in content or path.name == "compiled.py":
            digest.update(f"{path.relative_to(package)} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


class ByContent(UserProvidedCacheLocator):
    """A folder of NUMBA_CACHE_DIR for the kernels of the package, wherever it is installed."""

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)
        package = next(folder for folder in Path(py_file).parents if folder.name == "splitquant_plugins")
        file = Path(py_file).relative_to(package)
        self._cache_path = str(Path(config.CACHE_DIR, digest_of_kernels(package), *file.with_suffix("").parts))

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Any:
        """Return the place of this function, or None where it is not the package's."""
        return super().from_function(py_func, py_file) if py_func.__module__.startswith("splitquant_plugins.") else None
