"""Unknown names are errors that say which known one was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from splitquant_plugins.errors import ConfigError


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for a name that is not known, with the nearest that is, and all of them."""
    names = sorted(known)
    for name in given:
        if name not in names:
            near = get_close_matches(str(name), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{where} has no {name!r}; {hint}It takes: {', '.join(names)}")
