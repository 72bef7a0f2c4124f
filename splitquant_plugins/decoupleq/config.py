"""The options of DecoupleQPass, validated."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from splitquant_plugins.config import validated
from splitquant_plugins.decoupleq.alternation import SolveOptions
from splitquant_plugins.decoupleq.training import TrainingOptions
from splitquant_plugins.errors import ConfigError, SplitQuantWarning
from splitquant_plugins.grid import Granularity, Grid, Scheme, UniformGrid

_DEFAULT_BITS = 2
# Parts begin so near to the float weight that the rates of whole layers lead away from it.
_RATE_OF_PARTS = 0.2
# Keywords of DecoupleQPass that are not of its configuration.
_OTHER_KEYWORDS = ("calibration", "calibration_bytes", "device", "progress", "resume_dir")


class DecoupleQConfig(BaseModel):
    """Options of DecoupleQPass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    bits: int | None = Field(None, ge=2, le=8, description="bits per code; None: the recipe's, or 2")
    granularity: Granularity | None = Field(None, description="what shares a scale; None: the recipe's, or channel")
    group_size: int | None = Field(None, ge=1, description="inputs that share a scale; None: the recipe's")
    scheme: Scheme | None = Field(None, description="affine or symmetric; None: the recipe's, or affine")
    include: tuple[str, ...] = Field((), description="shell patterns of layer names; empty: all layers")
    exclude: tuple[str, ...] = Field((), description="shell patterns of layer names that keep plain rounding")
    sequential: bool = Field(True, description="solve layers in order, each on inputs that the solved ones make")
    asymmetric_calibration: float = Field(
        0.5, ge=0, le=1, description="with sequential: part of what the layers before lost that a layer makes up for"
    )
    coupled_rows: bool = Field(
        True,
        description="with asymmetric_calibration: a layer's outputs make up for each other, as its block sees them",
    )
    objective: Literal["outputs", "predictions"] = Field(
        "outputs", description="where coupled rows count: in the block's outputs, or in the model's predictions"
    )
    tune_blocks: bool = Field(False, description="then train each block towards the float model's outputs")
    tune_model: bool = Field(False, description="at last train the whole model towards the float model's predictions")
    tune_codes: bool = Field(True, description="in training: codes and zero points too, not only scales and norms")
    tune_norms: bool = Field(True, description="in training: the norms' parameters too")
    tune_biases: bool = Field(False, description="in training: the layers' biases too")
    epochs: int = Field(12, ge=0, description="with tune_blocks: most passes over the batches")
    block_window: int = Field(2, ge=1, description="with tune_blocks: so many blocks that follow are trained together")
    block_steps: int = Field(500, ge=0, description="with tune_blocks: most training steps per block")
    model_steps: int = Field(1600, ge=0, description="with tune_model: most training steps")
    batch_size: int = Field(4, ge=1, description="in training: rows (sequences, images) per step")
    held_out: float = Field(0.125, gt=0, lt=1, description="part of the rows that training is judged by, at most 64")
    learning_rate: float = Field(1e-3, gt=0, description="of norms and biases; of scales twice that; of splits a fifth")
    code_learning_rate: float = Field(
        2e-2, gt=0, description="of codes, per step; of zeros a quarter; of splits a fifth"
    )
    damping: float = Field(0.01, ge=0, description="part of the mean diagonal of H that is added to its diagonal")
    rounding: Literal["gptq", "projected"] = Field("gptq", description="how codes are chosen for given scales")
    rounds: int = Field(4, ge=0, description="most alternations of codes and scales per start")
    starts: tuple[float, ...] = Field((1.0, 0.85, 1.2), description="first ranges, as factors of the best plain one")
    sweeps: int = Field(4, ge=0, description="sweeps of coordinate descent after each rounding")
    search_inputs: int = Field(10, ge=0, description="rows of at most so many weights are searched more widely")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the search, and of the order of training batches")

    def grid(self, given: Grid | None) -> Grid:
        """Return the recipe's grid, or without one the plain grid of these options; ConfigError where they differ."""
        wanted = {"bits": self.bits, "granularity": self.granularity, "scheme": self.scheme}
        if given is None:
            granularity = self.granularity or ("channel" if self.group_size is None else "group")
            return UniformGrid(self.bits or _DEFAULT_BITS, self.scheme or "affine", granularity, self.group_size)
        # A backend that sets the group size by the shape of the weight says None.
        wanted["group_size"] = self.group_size
        for option, value in wanted.items():
            if value is not None and value != getattr(given, option):
                raise ConfigError(
                    f"DecoupleQPass({option}={value!r}), but the recipe rounds to a grid with {option}="
                    f"{getattr(given, option)!r}: leave the option out, or change the recipe"
                )
        return given

    def solve_options(self) -> SolveOptions:
        """Options of the layer stage."""
        return SolveOptions(**{key: value for key, value in self if key in SolveOptions.__dataclass_fields__})

    def training_options(self, examples: int, *, whole_model: bool, in_parts: bool = False) -> TrainingOptions:
        """Options of the training of a block, or of the model, on so many examples; `in_parts`: some layer is split."""
        part = _RATE_OF_PARTS if in_parts else 1.0
        return TrainingOptions(
            steps=self.model_steps if whole_model else min(self.block_steps, self.epochs * examples),
            code_rate=part * self.code_learning_rate,
            point_rate=part * self.code_learning_rate / 4,
            scale_rate=part * 2 * self.learning_rate,
            float_rate=part * self.learning_rate,
            trains_codes=self.tune_codes,
            seed=self.seed,
        )


def decoupleq_config(options: dict[str, Any]) -> DecoupleQConfig:
    """Validate keyword options of DecoupleQPass; `drift` is the former name of `asymmetric_calibration`."""
    if "drift" in options:
        warnings.warn(
            "DecoupleQPass: the option drift is called asymmetric_calibration now; the old name goes with the next "
            "release",
            SplitQuantWarning,
            stacklevel=3,
        )
        options = {"asymmetric_calibration": options["drift"], **options}
        del options["drift"]
    config: DecoupleQConfig = validated(DecoupleQConfig, options, "DecoupleQPass", _OTHER_KEYWORDS)
    config.grid(None)  # checks that granularity and group_size go together
    config.solve_options()
    return config
