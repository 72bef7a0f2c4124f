"""DecoupleQPass: choose the values that a backend's plain rounding will give, with calibration data.

decoupleQ (arXiv 2404.12759) solves integers, scales and zeros of each layer for a small error of its outputs. The
solution is written back as float weights that lie on the backend's own grid, so that its rounding to nearest finds
exactly the solution; no backend has to know of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitquant_plugins.checkpoints.coverage import coverage, float_tensors
from splitquant_plugins.decoupleq.config import decoupleq_config
from splitquant_plugins.decoupleq.device import on_device, refuse_missing_device
from splitquant_plugins.decoupleq.layers import layers_to_solve
from splitquant_plugins.decoupleq.record import manifest_of_run
from splitquant_plugins.decoupleq.resume import refuse_file
from splitquant_plugins.decoupleq.run import Run
from splitquant_plugins.errors import AlreadySplitError, ConfigError, InputError
from splitquant_plugins.grid import Grid
from splitquant_plugins.manifest import ATTRIBUTE, Manifest, set_manifest
from splitquant_plugins.passes.base import GridRule, ModelPass
from splitquant_plugins.passes.calibration import Batches, evaluating
from splitquant_plugins.passes.checks import refuse_quantized_model, refuse_unfit_modules
from splitquant_plugins.passes.module_tree import restored_on_error
from splitquant_plugins.plugins import Plugins


class DecoupleQPass(ModelPass):
    """Choose the rounded values of every layer with calibration data, at no cost in storage.

    Options are those of `DecoupleQConfig`, as keywords; an unknown one is an error that lists them. `calibration`
    are unlabelled batches (dicts of keyword arguments, tuples, tensors, or a function that returns an iterator over
    them); a few hundred inputs do. `resume_dir` keeps finished blocks, from which a run with the same options,
    weights and batches goes on. `calibration_bytes` limits the statistics held at once, `progress` shows a bar. All is
    computed on `device`, as `"cuda"`, to which the model is moved for that time; None: where the model is. The manifest
    is found with `manifest_of(model)`.

    After a SplitQuantPass the parts of a layer are solved together; they then no longer sum to the float weight,
    but to what serves the layer's outputs best.

    Source: decoupleQ, arXiv 2404.12759.
    """

    def __init__(
        self,
        *,
        calibration: Batches | None = None,
        progress: bool = False,
        resume_dir: str | Path | None = None,
        calibration_bytes: int = 2**30,
        device: str | None = None,
        plugins: Plugins | None = None,
        **options: Any,
    ) -> None:
        if calibration is None:
            raise ConfigError("DecoupleQPass needs calibration=batches, a few hundred unlabelled inputs")
        if isinstance(calibration, Iterator):
            raise ConfigError(
                "calibration is a one-shot iterator, and the batches are read several times: give a list, a "
                "DataLoader, or a function that returns an iterator"
            )
        self.plugins = plugins or Plugins.load()
        self.calibration = calibration
        self.progress = progress
        self.resume_dir = resume_dir
        self.calibration_bytes = calibration_bytes
        self.device = None if device is None else str(device)
        refuse_missing_device(self.device)
        self.config = decoupleq_config(options)

    @classmethod
    def from_options(cls, options: dict[str, Any], plugins: Plugins | None = None) -> DecoupleQPass:
        """Make a pass of what `options` returned; its calibration data have to be set before it runs."""
        made = cls(calibration=(), plugins=plugins, **options)
        made.calibration = None
        return made

    def options(self) -> dict[str, Any]:
        """Return all keywords but calibration and plugins, as JSON takes them."""
        folder = None if self.resume_dir is None else str(self.resume_dir)
        own: dict[str, Any] = {"progress": self.progress, "resume_dir": folder, "device": self.device}
        own["calibration_bytes"] = self.calibration_bytes
        return {**self.config.model_dump(mode="json"), **own}

    @property
    def rounds_to_recipe(self) -> bool:
        """True: the values lie on the recipe's grid."""
        return True

    def __repr__(self) -> str:
        chosen = self.config.model_dump(exclude_defaults=True)
        return f"DecoupleQPass({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"

    def __add__(self, recipe: Any) -> Any:
        """Return a recipe of the same kind as `recipe` that runs this pass first."""
        if isinstance(recipe, ModelPass):
            raise ConfigError(
                f"DecoupleQPass + {type(recipe).__name__}: values are chosen last; write "
                "SplitQuantPass(...) + DecoupleQPass(...) + recipe"
            )
        return super().__add__(recipe)

    def apply(self, model: nn.Module, *, grid: Grid | GridRule | None = None, ignore: Sequence[str] = ()) -> nn.Module:
        """Replace the weights of the model's layers by solved ones and return the model.

        On an error the model is put back as it was.
        """
        self.refuse_missing_calibration()
        _refuse_unfit(model)
        refuse_file(self.resume_dir)
        started, tensors = time.perf_counter(), float_tensors(model)
        with on_device(model, self.device):
            layers, kept = layers_to_solve(model, self.config, self.plugins, grid, ignore)
            run = Run(
                model,
                layers,
                self.config,
                self.calibration,
                calibration_bytes=self.calibration_bytes,
                resume_dir=self.resume_dir,
                progress=self.progress,
            )
            try:
                # In inference mode torch counts no writes and has no gradients.
                with restored_on_error(model), evaluating(model), torch.inference_mode(False):
                    run.solve()
            except BaseException:
                run.put_back()
                raise
        manifest = manifest_of_run(model, self.config, layers, run.records, kept, run.layer_stage.notes)
        if manifest.coverage is None:
            manifest.coverage = coverage(tensors, None, manifest)
        manifest.seconds += time.perf_counter() - started
        set_manifest(model, manifest)
        for record in manifest.layers:
            self.plugins.after_layer(record)
        self.plugins.after_split(model, manifest)
        return model


def _refuse_unfit(model: object) -> None:
    if isinstance(model, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        raise InputError(
            "an exported graph has no layer modules: attach the pass to the PT2E quantizer instead, "
            "DecoupleQPass(...) + quantizer"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"DecoupleQPass takes a torch.nn.Module, not a {type(model).__name__}")
    manifest = getattr(model, ATTRIBUTE, None)
    if isinstance(manifest, Manifest) and manifest.values is not None:
        raise AlreadySplitError("DecoupleQPass was applied to this model before; load it afresh")
    refuse_quantized_model(model)
    refuse_unfit_modules(model)
