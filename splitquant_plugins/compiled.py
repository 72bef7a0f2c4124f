"""Functions compiled to machine code, which run without the interpreter lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from collections.abc import Callable


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on the first call, and keep the result for the next process where a folder for it can be written to."""
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy", no_cfunc_wrapper=True)
    except RuntimeError:  # no folder for the cache can be written to: compile in each process
        return numba.njit(function, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
