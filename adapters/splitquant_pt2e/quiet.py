"""What vendors' packages print, log and warn, kept away from a user who cannot do anything about it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from splitquant_plugins.errors import SplitQuantWarning


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Hand out what is printed within the block; warnings of others, and log lines below errors, are dropped.

    The root logger's level is WARNING at least: below, Arm's backend has vela print all it knows to the terminal, and
    the import of Qualcomm's sets it to INFO.
    """
    said, before, level = io.StringIO(), logging.root.manager.disable, logging.root.level
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SplitQuantWarning)
        logging.disable(max(before, logging.WARNING))
        logging.root.setLevel(max(level, logging.WARNING))
        try:
            yield said
        finally:
            logging.disable(before)
            logging.root.setLevel(level)
