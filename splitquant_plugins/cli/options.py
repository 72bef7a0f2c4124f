"""Options and settings that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitquant_plugins.checkpoints.files import refuse_output_file
from splitquant_plugins.errors import ConfigError

if TYPE_CHECKING:
    from splitquant_plugins.backends import WeightRequest

_PATTERNS = ("include", "exclude")
# What the commands have an option of their own for, which -O would overrule or contradict.
OWN_OPTIONS = {
    "k": "--k",
    "budget": "--budget",
    "jobs": "--jobs",
    "seed": "--seed",
    "splitter": "--split",
    "calibration": "--calibration",
}


class CommaList(click.ParamType):
    """A comma-separated list of names, or of numbers where `kind` is int."""

    def __init__(self, kind: type = str) -> None:
        self.kind = kind
        self.name = "name,name" if kind is str else "number,number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Split at commas; an empty list is an error."""
        if isinstance(value, list):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            self.fail("give at least one value", param, ctx)
        try:
            return [self.kind(name) for name in names]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers", param, ctx)


def _writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Find out before any work whether the file can be written."""
    if path is not None:
        refuse_output_file(path)
    return path


json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), callback=_writable, help="Write the rows as JSON too."
)

html_option = click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path),
    callback=_writable,
    help="Write a page with the table, the trade-off and every layer, which needs no other file.",
)


def refuse_same_output(**outputs: Path | None) -> None:
    """Raise ConfigError where two of a command's outputs are one file; by the names of the options."""
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        other = name if path is None else seen.setdefault(path.resolve(), name)
        if other != name:
            raise ConfigError(f"--{other} and --{name} both write {path}: choose another name for one")


def refuse_inputs_as_output(path: Path | None, *inputs: str | Path | None) -> None:
    """Raise InputError where the file to be written is one of those that are read, or in such a folder."""
    from splitquant_plugins.evaluation.python_functions import path_of

    if path is not None:
        read = [path_of(str(each)) for each in inputs if each is not None]
        refuse_output_file(path, [each for each in read if Path(each).exists()])


def _all(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# Those that choose the grid, where the backend leaves a choice.
grid_options = _all(
    click.option("--granularity", type=click.Choice(["tensor", "channel", "group"]), help="What shares a scale."),
    click.option("--group-size", type=click.IntRange(min=1), help="Values that share a scale (group only)."),
    click.option("--scheme", type=click.Choice(["affine", "symmetric"]), help="Default: the backend's best."),
)
# Those of the pass.
split_options = _all(
    click.option("--k", type=int, help="Parts per layer.  [default: 3]"),
    click.option("--budget", type=float, help="Stored bits per weight; chooses the parts of each layer."),
    click.option(
        "--calibration",
        help="Data as --data takes them, labels not needed, for what uses it; `self`: text that a language model "
        "writes itself.",
    ),
    click.option(
        "-O", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Further options of SplitQuantPass."
    ),
    click.option("--jobs", type=int, default=1, show_default=True, help="Layers split at once; -1: all cores."),
)

# Those of language models.
language_options = _all(
    click.option(
        "--context",
        type=click.IntRange(min=2),
        help="Tokens that a language model sees at once.  [default: its positions, at most 2048]",
    ),
    click.option("--head", is_flag=True, help="Quantize the head of a language model too; one that is tied is untied."),
)
stride_option = click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens that each further window of a long document predicts.  [default: half the context]",
)


def untied_for_head(options: dict[str, Any], *, head: bool) -> dict[str, Any]:
    """Return the options of the pass, which splits a tied head where it is asked for."""
    return {"untie_embeddings": True, **options} if head else options


def weight_request(
    weights: str, *, granularity: Any, group_size: int | None, scheme: Any, method: str = "rtn", **_: Any
) -> WeightRequest:
    """Return the request for weights of a width with the grid that the options chose."""
    from splitquant_plugins.backends import WeightRequest

    return WeightRequest(weights, granularity, group_size, scheme, method)


def pass_options(
    *, k: int | None = None, budget: float | None = None, jobs: int = 1, extra: tuple[str, ...] = (), **_: Any
) -> dict[str, Any]:
    """Return the keywords of SplitQuantPass; NAME=VALUE are true, false, numbers, lists with commas, or text."""
    options: dict[str, Any] = {"jobs": jobs}
    options.update({name: value for name, value in (("k", k), ("budget", budget)) if value is not None})
    given: set[str] = set()
    for item in extra:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"-O {item}: write NAME=VALUE")
        name = name.strip().replace("-", "_")
        if name in OWN_OPTIONS:
            raise ConfigError(f"-O {item}: write {OWN_OPTIONS[name]} {value.strip()}")
        if name in given:
            raise ConfigError(f"-O {name} is given twice")
        given.add(name)
        # A pattern may be a number, as the names of layers in a Sequential are.
        options[name] = tuple(value.strip().split(",")) if name in _PATTERNS else _parsed(value.strip())
    return options


def _parsed(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return tuple(value.split(",")) if "," in value else value


def quiet_libraries() -> None:
    """Keep the progress bars and log lines of libraries out of the way of the command's own output."""
    import logging

    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", "neural_compressor", "torch.utils._pytree", "distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
