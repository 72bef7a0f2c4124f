"""The record of what was split, how and at what cost; enough to rebuild the split skeleton."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from splitquant_plugins.checkpoints.coverage import Coverage
from splitquant_plugins.checkpoints.files import described, read_described, write_text
from splitquant_plugins.checkpoints.pretrained_config import describe_to_transformers
from splitquant_plugins.config import SplitConfig
from splitquant_plugins.errors import InputError, SkeletonMismatchError

if TYPE_CHECKING:
    from torch import nn


FORMAT = 1
FILE_NAME = "splitquant_manifest.json"
ATTRIBUTE = "splitquant_manifest"


class TrainingRecord(BaseModel):
    """One training of a layer's codes, scales and zeros with others: `what`, a block or the model.

    `held_out_before` and `held_out_after` are errors on the `rows_held_out`, which were not trained on: of a block, the
    square error of its outputs as a part of their mean square; of the model, the divergence of its predictions from the
    float model's. They are equal where training did not help and was undone. `rows`: sequences or images trained on.
    """

    model_config = ConfigDict(extra="forbid")

    what: str
    held_out_before: float
    held_out_after: float
    steps: int
    rows: int
    rows_held_out: int
    seconds: float = 0.0


class ValuesRecord(BaseModel):
    """What DecoupleQPass did to the values of a layer: `solved` them, or kept plain rounding for `reason`.

    `error_before` and `error_after` are the mean square error that the rounded weight causes in the layer's
    outputs, summed over the outputs, for plain rounding and for the solution, as the solver weighs it: against the
    target of asymmetric calibration, with `damping`, which counts in directions that the inputs never take, and where
    its rows are coupled with the outputs weighed together.
    `rounds` is the number of steps of the solver, `samples` the number of inputs seen. `plain_rows` counts output
    channels that keep plain rounding. `joint` tells that the parts of a split layer were solved together, and no longer
    sum to the float weight. `trainings` came after that, in order, and leave `error_after` as it was.
    """

    model_config = ConfigDict(extra="forbid")

    action: Literal["solved", "kept"]
    reason: str | None = None
    grid: str = ""
    error_before: float = 0.0
    error_after: float = 0.0
    rounds: int = 0
    samples: int = 0
    plain_rows: int = 0
    joint: bool = False
    trainings: tuple[TrainingRecord, ...] = ()
    seconds: float = 0.0


class ClippingRecord(BaseModel):
    """What ClipPass did to a layer: the squared error of its rounded weights, as they were and clipped, summed.

    `groups` share a range each, and `clipped_groups` of them got a narrower one.
    """

    model_config = ConfigDict(extra="forbid")

    error_before: float
    error_after: float
    groups: int
    clipped_groups: int


class LayerRecord(BaseModel):
    """One layer: split into `parts`, or left whole for `reason`.

    `shape` is the weight's with output channels first. `bias_parts` names the parts that hold a bias.
    `also_known_as` are further names that a shared module is reached by; `shared_with` names the layer whose
    parts this one shares because their weights were tied. `values` is there where DecoupleQPass ran,
    `clipping` where ClipPass did.

    `splitter` made the parts, or was asked for some and made none that are of use; `why` says what chose it, where the
    user did not. Where the recipe's grid is known, `error_whole`
    and `error_split` are the squared error that it makes of the whole and of the split weight, summed over the
    weights, or with calibration data the mean squared error of the layer's outputs, summed over the outputs.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    action: Literal["split", "kept"]
    reason: str | None = None
    also_known_as: tuple[str, ...] = ()
    shared_with: str | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    granularity: str = ""
    splitter: str = ""
    why: str = ""
    error_whole: float | None = None
    error_split: float | None = None
    k: int = Field(1, ge=1, le=16)
    parts: tuple[str, ...] = ()
    bias_parts: tuple[str, ...] = ()
    seconds: float = 0.0
    values: ValuesRecord | None = None
    clipping: ClippingRecord | None = None


class Manifest(BaseModel):
    """What the passes did to a model. Saved as JSON beside the weights.

    `values` are the options of DecoupleQPass, where it ran. `recipe` says, as a recipe file does, which backend and
    weight format came after, where `splitquant quantize` saw to it.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    version: str = ""
    config: SplitConfig
    splitter_options: dict[str, object] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    layers: list[LayerRecord] = Field(default_factory=list)
    coverage: Coverage | None = None
    values: dict[str, object] | None = None
    recipe: dict[str, object] | None = None
    seconds: float = 0.0

    @property
    def split(self) -> list[LayerRecord]:
        """The layers that were split."""
        return [record for record in self.layers if record.action == "split"]

    @property
    def kept(self) -> list[LayerRecord]:
        """The layers that were left whole, each with a reason."""
        return [record for record in self.layers if record.action == "kept"]

    @property
    def harmed(self) -> list[LayerRecord]:
        """The layers whose split makes a larger error on the recipe's grid than the whole layer, worst first."""
        known = [r for r in self.split if r.error_whole is not None and r.error_split is not None]
        ratios = [(r.error_split / r.error_whole if r.error_whole else math.inf, r) for r in known if r.error_split]
        return [record for ratio, record in sorted(ratios, key=lambda pair: -pair[0]) if ratio > 1]

    @property
    def solved(self) -> list[LayerRecord]:
        """The layers whose values DecoupleQPass solved."""
        return [record for record in self.layers if record.values is not None and record.values.action == "solved"]

    def save(self, folder: str | Path) -> Path:
        """Write the manifest into a folder, at once or not at all."""
        path = Path(folder) / FILE_NAME
        write_text(path, self.model_dump_json(indent=1))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a saved model; a damaged file is an InputError."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise InputError(f"{folder} holds no {FILE_NAME}: it is not a model saved by splitquant")
        return read_described(path, cls)


def manifest_from(given: Any, where: str) -> Manifest:
    """Return a manifest from its JSON, read already; a damaged one is an InputError that says `where`."""
    return described(given, where, Manifest)


def manifest_of(model: nn.Module) -> Manifest:
    """Return the manifest of a split model; SkeletonMismatchError where the model was not split."""
    manifest = getattr(model, ATTRIBUTE, None)
    if manifest is None:  # PT2E hands on the meta of a graph module, not its attributes
        manifest = (getattr(model, "meta", None) or {}).get(ATTRIBUTE)
    if not isinstance(manifest, Manifest):
        raise SkeletonMismatchError(f"{type(model).__name__} was not split: it carries no manifest")
    return manifest


def set_manifest(model: nn.Module, manifest: Manifest) -> None:
    """Attach the manifest to the model that it describes, and have a transformers model save it with itself."""
    setattr(model, ATTRIBUTE, manifest)
    describe_to_transformers(model, manifest)
