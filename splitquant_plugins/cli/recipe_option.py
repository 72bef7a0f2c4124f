"""`--recipe FILE` and `--save-recipe FILE`: what a file says are the defaults of the options of a command."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitquant_plugins.cli.options import refuse_inputs_as_output, refuse_same_output
from splitquant_plugins.errors import ConfigError

if TYPE_CHECKING:
    from splitquant_plugins.recipes.recipe import Recipe

_META = "splitquant.recipe"
# Keys of a recipe that are options of the commands, and the options of SplitQuantPass that have one of their own.
_PLAIN = ("granularity", "group_size", "scheme", "calibration", "context", "stride", "head")
_OF_SPLIT = {"k": "k", "budget": "budget", "splitter": "splitter", "seed": "seed"}
# Names of the same options in a command that compares several of each.
_SEVERAL = {
    "backend": "backends",
    "splitter": "splits",
    "method": "methods",
    "seed": "seeds",
    "quantizer": "quantizers",
}


def recipe_options(*, several: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the two options; the command is called with `decoupleq`, the options of DecoupleQPass or None, as well.

    What the command line says goes before what the file says. `several` is for a command that takes lists, and that
    runs what the recipe says beside the same without its split and without decoupleQ.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(*args: Any, recipe: Path | None, save_recipe: Path | None, **given: Any) -> Any:
            context = click.get_current_context()
            read: Recipe | None = context.meta.get(_META)
            if read is not None:
                _refuse_lost_options(context)
                _refuse_code(context, given)
            decoupleq = None if read is None else read.decoupleq
            outputs = {name: given.get(f"{name}_path") for name in ("json", "html")}
            for path in outputs.values():
                refuse_inputs_as_output(path, recipe)
            refuse_same_output(**outputs, **{"save-recipe": save_recipe})
            if save_recipe is not None:
                inputs = [given.get(name) for name in ("model", "data", "calibration")]
                refuse_inputs_as_output(save_recipe, recipe, *inputs)
                kept = {"stride": None if read is None else read.stride}  # of no use to a command without it
                _save(save_recipe, {**kept, **given}, decoupleq, several=several)
            return command(*args, decoupleq=decoupleq, **given)

        run = click.option(
            "--save-recipe",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write what is run as a recipe file.",
        )(run)
        return click.option(
            "--recipe",
            type=click.Path(dir_okay=False, path_type=Path),
            is_eager=True,
            callback=functools.partial(_read, several=several),
            help="YAML or JSON with the options of the pass, decoupleQ, backend, weights and calibration; options "
            "given here go before it.",
        )(run)

    return add


def _read(context: click.Context, parameter: click.Parameter, path: Path | None, *, several: bool) -> Path | None:
    if path is None:
        return None
    from splitquant_plugins.recipes.files import read_recipe

    recipe = read_recipe(path)
    context.meta[_META] = recipe
    context.default_map = {**(context.default_map or {}), **_defaults(recipe, several=several)}
    return path


def _defaults(recipe: Recipe, *, several: bool) -> dict[str, Any]:
    """The options of a command, by the names of its parameters, as a recipe has them."""
    from splitquant_plugins.recipes.recipe import UNSPLIT

    split = recipe.options()
    found: dict[str, Any] = {name: getattr(recipe, name) for name in ("backend", "weights", "quantizer", *_PLAIN)}
    found.update({name: split.pop(key, None) for key, name in _OF_SPLIT.items()})
    if recipe.split == UNSPLIT:
        found["splitter"] = UNSPLIT
    found["method"] = recipe.method if recipe.decoupleq is None or several else "decoupleq"
    found["extra"] = [f"{name}={_text(name, value)}" for name, value in split.items() if value not in (None, [], ())]
    if several:
        splitter = found["splitter"] or "auto"
        found["splitter"] = UNSPLIT if splitter == UNSPLIT else f"{UNSPLIT},{splitter}"
        if recipe.decoupleq is not None:
            found["method"] = f"{recipe.method or 'rtn'},decoupleq"
        found = {_SEVERAL.get(name, name): value for name, value in found.items()}
        found["seeds"] = None if found["seeds"] is None else str(found["seeds"])
    return {name: value for name, value in found.items() if value not in (None, [])}


def _text(name: str, value: Any) -> str:
    """An option as -O NAME=VALUE takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        if any("," in str(each) for each in value):
            raise ConfigError(f"split: {name}: {value!r}: a pattern with a comma cannot be given to a command")
        return ",".join(map(str, value))
    return str(value)


def _refuse_lost_options(context: click.Context) -> None:
    """Raise ConfigError for -O beside a recipe, whose own further options it would replace without a word."""
    if context.get_parameter_source("extra") == click.core.ParameterSource.COMMANDLINE:
        raise ConfigError("-O beside --recipe: write the option into the recipe, under split")


def _refuse_code(context: click.Context, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a Python file that a recipe alone names: what is run is named on the command line."""
    from splitquant_plugins.evaluation.python_functions import split_function

    code = split_function(given.get("calibration") or "")
    if code is None or context.get_parameter_source("calibration") == click.core.ParameterSource.COMMANDLINE:
        return
    named = (split_function(given.get(name) or "") for name in ("model", "data"))
    if not any(each is not None and each[0].resolve() == code[0].resolve() for each in named):
        raise ConfigError(
            f"the recipe names the Python file {code[0]}, and only files that the command line names are run: if you "
            f"trust it, give --calibration {given['calibration']}"
        )


def _save(path: Path, given: Mapping[str, Any], decoupleq: dict[str, Any] | None, *, several: bool) -> None:
    """Write the options of one run; ConfigError where they are of several."""
    from splitquant_plugins.cli.options import pass_options
    from splitquant_plugins.recipes.files import write_recipe
    from splitquant_plugins.recipes.recipe import UNSPLIT, recipe_from

    known = {_single(name): value for name, value in given.items()} if several else dict(given)
    split = pass_options(k=known["k"], budget=known["budget"], extra=known["extra"])
    del split["jobs"]
    methods = _without(known["method"], "decoupleq", also="rtn" if decoupleq is not None else None)
    splitter = _one("split", _without(known["splitter"], UNSPLIT)) or UNSPLIT
    options: dict[str, Any] = {"splitter": splitter, "seed": _one("seed", known["seed"]), **split}
    content = {
        "backend": _one("backend", known["backend"]),
        "weights": None if known.get("quantizer") else _one("weights", known["weights"]),
        "quantizer": _one("quantizer", known.get("quantizer")),
        **{name: known[name] or None for name in _PLAIN},
        "method": _one("method", methods),
        "split": UNSPLIT if splitter == UNSPLIT else {k: v for k, v in options.items() if (k, v) != ("seed", 0)},
        "decoupleq": decoupleq if decoupleq is not None or "decoupleq" not in known["method"] else {},
    }
    content = {key: value for key, value in content.items() if value is not None}
    write_recipe(path, recipe_from(content, f"--save-recipe {path}"))


def _single(name: str) -> str:
    return {several: one for one, several in _SEVERAL.items()}.get(name, name)


def _without(value: Any, left_out: str, also: str | None = None) -> Any:
    """A list without what is run beside the recipe; one value as it is, or None for that one."""
    values = value if isinstance(value, list) else [value]
    rest = [each for each in values if each != left_out]
    return [each for each in rest if each != also] or rest


def _one(option: str, value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if len(values) > 1:
        raise ConfigError(
            f"--save-recipe: a recipe has one --{option}, and this command has {', '.join(map(str, values))}"
        )
    return values[0] if values else None
