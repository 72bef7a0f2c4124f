"""The `splitquant` command: bad input is one clear line on standard error and exit status 2."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

import click

from splitquant_plugins.errors import SplitQuantError, SplitQuantWarning

COMMANDS = {
    "demo": "splitquant_plugins.cli.demo:demo",
    "compare": "splitquant_plugins.cli.compare:compare",
    "inspect": "splitquant_plugins.cli.inspect:inspect",
    "quantize": "splitquant_plugins.cli.quantize:quantize",
    "recipe": "splitquant_plugins.cli.recipe:recipe",
    "export": "splitquant_plugins.cli.export:export",
    "plugins": "splitquant_plugins.cli.plugins:plugins",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order a new user needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.version_option(package_name="splitquant-plugins")
@click.pass_context
def cli(context: click.Context) -> None:
    """Split layers so that low-bit quantization works: SplitQuant in front of the recipe you have."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 below a threshold, 2 for bad input, 130 for an interrupt."""
    warnings.showwarning = _one_line_warning
    try:
        result = cli.main(args=arguments, prog_name="splitquant", standalone_mode=False)
    except click.ClickException as error:
        return _complain(error.format_message())
    except SplitQuantError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("splitquant: interrupted", err=True)
        return 130
    return result if isinstance(result, int) else 0


def _complain(message: str) -> int:
    click.echo(f"splitquant: error: {' '.join(message.split())}", err=True)
    return 2


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Show the package's own warnings in one line, and leave those of libraries out of a user's sight."""
    if issubclass(category, SplitQuantWarning):
        click.echo(f"splitquant: warning: {' '.join(str(message).split())}", err=True)


if __name__ == "__main__":
    main()
