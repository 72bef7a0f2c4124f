"""A recipe: the pass with all its options, decoupleQ, the backend, the weight format and the calibration data."""

from __future__ import annotations

from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from splitquant_plugins.config import SplitConfig
from splitquant_plugins.decoupleq.config import DecoupleQConfig, decoupleq_config
from splitquant_plugins.decoupleq.layers import UNSPLIT as DECOUPLEQ_ALONE
from splitquant_plugins.errors import ConfigError, SplitQuantError
from splitquant_plugins.manifest import Manifest
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import Plugins
from splitquant_plugins.recipes.nearest import refuse_unknown

UNSPLIT: Literal["none"] = "none"


class Recipe(BaseModel):
    """What a recipe file says. Whatever is left out has the default of the commands.

    `split` are the options of SplitQuantPass and of its splitter, patterns of layer names among them; `none` is no
    split. `decoupleq` are those of DecoupleQPass, which runs where the key is there, on the parts if there are any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    backend: str | None = Field(None, description="quanto, inc, pt2e or simulated; see `splitquant plugins`")
    weights: str | None = Field(None, description="int2, int4 or int8")
    quantizer: str | None = Field(None, description="a stock quantizer of the backend, instead of a weight format")
    granularity: Literal["tensor", "channel", "group"] | None = Field(None, description="what shares a scale")
    group_size: int | None = Field(None, ge=1, description="inputs that share a scale, with granularity group")
    scheme: Literal["affine", "symmetric"] | None = Field(None, description="default: the backend's best")
    method: str | None = Field(None, description="rtn, or hqq and gptq where the backend has them")
    split: dict[str, Any] | Literal["none"] = Field(
        default_factory=dict, description="options of SplitQuantPass and of its splitter, or none"
    )
    decoupleq: dict[str, Any] | None = Field(None, description="options of DecoupleQPass, {} for its defaults")
    calibration: str | None = Field(
        None,
        description="data as --data takes them, relative to the recipe's folder; self: the model's own text. A "
        "FILE.py:FUNCTION has to be named on the command line too",
    )
    context: int | None = Field(None, ge=2, description="tokens that a language model sees at once")
    stride: int | None = Field(None, ge=1, description="tokens that each further window of a long document predicts")
    head: bool | None = Field(None, description="quantize the head of a language model too")

    def options(self) -> dict[str, Any]:
        """Return the keywords of SplitQuantPass; none where nothing is split."""
        return {} if self.split == UNSPLIT else dict(self.split)

    def as_written(self) -> dict[str, Any]:
        """Return what a file has to say, without defaults."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)


def recipe_from(content: Any, where: str, plugins: Plugins | None = None) -> Recipe:
    """Validate what a file holds, options of the passes included; ConfigError names the file, the key and the fix."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{where} is no recipe: it holds a {type(content).__name__}, and not keys with values")
    refuse_unknown(content, Recipe.model_fields, f"{where}: a recipe")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"][:1])
        raise ConfigError(f"{where}: {key}: {content.get(key)!r}: {problem['msg'].lower()}") from None
    if recipe.split != UNSPLIT:
        recipe = recipe.model_copy(update={"split": _lists(recipe.options())})
    plugins = plugins or Plugins.load()
    if recipe.backend is not None:
        refuse_unknown([recipe.backend], plugins.backends, f"{where}: backend")
    if recipe.split != UNSPLIT:
        _check_split(recipe.options(), f"{where}: split", plugins)
    if recipe.decoupleq is not None:
        refuse_unknown(recipe.decoupleq, DecoupleQConfig.model_fields, f"{where}: decoupleq")
        _with_place(lambda: decoupleq_config(dict(recipe.decoupleq or {})), f"{where}: decoupleq")
    return recipe


def recipe_of(manifest: Manifest) -> Recipe:
    """Return the recipe that made a model, from the manifest that came of it.

    The backend and its weight format are in it where `splitquant quantize` made the model; calibration data are not in
    a manifest, and have to be named again.
    """
    if any(record.clipping is not None for record in manifest.layers):
        raise ConfigError(
            "the model was made with ClipPass, which recipe files do not hold; write the recipe in Python"
        )
    split: dict[str, Any] | Literal["none"] = UNSPLIT
    if manifest.config != DECOUPLEQ_ALONE:
        split = {**manifest.config.model_dump(mode="json", exclude_defaults=True), **_plain(manifest.splitter_options)}
        if manifest.config.budget is not None:
            split.pop("k", None)
    defaults = DecoupleQConfig().model_dump(mode="json")
    values = None
    if manifest.values is not None:
        values = {key: value for key, value in _plain(manifest.values).items() if defaults.get(key, ...) != value}
    return Recipe.model_validate({**(manifest.recipe or {}), "split": split, "decoupleq": values})


def _check_split(options: dict[str, Any], where: str, plugins: Plugins) -> None:
    name = options.get("splitter", SplitConfig.model_fields["splitter"].default)
    refuse_unknown([name], plugins.splitters, f"{where}: splitter")
    known = [*SplitConfig.model_fields, *plugins.splitter(name).Options.model_fields]
    refuse_unknown(options, known, f"{where} with splitter {name!r}")
    _with_place(lambda: SplitQuantPass(plugins=plugins, **options), where)


def _with_place(make: Any, where: str) -> None:
    try:
        make()
    except SplitQuantError as error:
        raise ConfigError(f"{where}: {error}") from None


def _lists(options: dict[str, Any]) -> dict[str, Any]:
    """A single pattern as a list of one, as the pass takes it too."""
    listed = {name for name, field in SplitConfig.model_fields.items() if get_origin(field.annotation) is tuple}
    return {key: [each] if key in listed and isinstance(each, str) else each for key, each in _plain(options).items()}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, as files have them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
