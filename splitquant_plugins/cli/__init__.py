"""The command line: one file per command, one line per error."""

from splitquant_plugins.cli.main import main

__all__ = ["main"]
