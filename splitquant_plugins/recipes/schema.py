"""The JSON schema of recipes, for editors; `python -m splitquant_plugins.recipes.schema` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitquant_plugins.checkpoints.files import write_text
from splitquant_plugins.config import SplitConfig
from splitquant_plugins.decoupleq.config import DecoupleQConfig
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.recipes.recipe import UNSPLIT, Recipe

PATH = Path(__file__).with_name("recipe.schema.json")


def schema() -> dict[str, Any]:
    """Return the schema. Options of splitters from other packages are not in it, and therefore allowed."""
    made = Recipe.model_json_schema()
    plugins = Plugins.load({})
    split = SplitConfig.model_json_schema()
    for name, registered in sorted(plugins.splitters.items()):
        if registered.plugin == "splitters":
            for option, described in plugins.splitter(name).Options.model_json_schema().get("properties", {}).items():
                own = {key: value for key, value in described.items() if key not in ("title", "default")}
                split["properties"].setdefault(option, {**own, "description": f"of splitter {name}"})
    split["additionalProperties"] = True
    text = {"description": made["properties"]["split"]["description"]}
    made["properties"]["split"] = {"anyOf": [split, {"const": UNSPLIT}], **text}
    made["properties"]["decoupleq"] = {"anyOf": [DecoupleQConfig.model_json_schema(), {"type": "null"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "splitquant recipe"}


def schema_text() -> str:
    """Return the schema as the file has it."""
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    write_text(PATH, schema_text())
