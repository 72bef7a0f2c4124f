"""`optimum-cli splitquant …`: Optimum loads every file of this namespace, and adds the commands it names."""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SplitQuantCommand(BaseOptimumCLICommand):
    """Hands its arguments to the `splitquant` command."""

    COMMAND = CommandInfo(name="splitquant", help="Split layers before low-bit quantization (SplitQuant).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take all arguments as they are."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the splitquant command")

    def run(self) -> None:
        """Run the command line, and exit with its status."""
        from splitquant_plugins.cli import main

        assert self.args is not None
        main(self.args.arguments)


REGISTER_COMMANDS = [SplitQuantCommand]
