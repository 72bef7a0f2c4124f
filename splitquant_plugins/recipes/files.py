"""Recipe files: YAML, of which JSON is a part, read as data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from splitquant_plugins.checkpoints.files import write_text
from splitquant_plugins.errors import InputError
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.recipes.recipe import Recipe, recipe_from

OWN_TEXT = "self"
_LARGEST = 1_000_000


class _Loader(yaml.SafeLoader):
    """Reads plain values only: no tags but those of JSON, no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, plugins: Plugins | None = None) -> Recipe:
    """Read a recipe; the path of its calibration data is one from the recipe's folder.

    Raises InputError for a file that is missing, a pipe or no YAML, ConfigError for a recipe that is wrong.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path} is a folder, a device or a pipe; give a file")
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path} has {path.stat().st_size} bytes, which no recipe takes")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text") from None
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    recipe = recipe_from(content, str(path), plugins)
    if recipe.calibration not in (None, OWN_TEXT):
        recipe = recipe.model_copy(update={"calibration": str(path.parent / str(recipe.calibration))})
    return recipe


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe, at once or not at all; a calibration file below its folder is named from there."""
    content = recipe.as_written()
    if recipe.calibration not in (None, OWN_TEXT):
        source, folder = Path(str(recipe.calibration)).resolve(), path.parent.resolve()
        content["calibration"] = str(source.relative_to(folder) if source.is_relative_to(folder) else source)
    write_text(path, yaml.safe_dump({"format": 1, **content}, sort_keys=False, allow_unicode=True))
