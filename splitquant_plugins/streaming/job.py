"""What is to be made, in JSON values alone: enough for any process that sees the same files to take part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from splitquant_plugins.backends import Backend, WeightFormat
from splitquant_plugins.checkpoints.source import Source
from splitquant_plugins.errors import ConfigError, InputError
from splitquant_plugins.passes.splitquant import SplitQuantPass
from splitquant_plugins.plugins import NOT_INSTALLED, Plugins, version_of
from splitquant_plugins.streaming.layout import make_layout
from splitquant_plugins.streaming.shards import Shards
from splitquant_plugins.streaming.workplace import Workplace

# What may change the bits of an output, besides the backend's own packages and the plugins'.
PACKAGES = ("splitquant-plugins", "torch", "numpy", "numba", "transformers")
# What a plan calls the layers that stay float.
IGNORED = "choice of layers that stay float"
# Sources of plugins that come with no distribution of their own.
BUILT_IN = "built in"


class Job(BaseModel):
    """A checkpoint, an output, and all options; `plan` is what the output depends on, to be compared elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    output: str
    backend: str
    weight_format: dict[str, Any]
    ignore: tuple[str, ...] | None
    options: dict[str, Any]
    splitter_options: dict[str, Any]
    jobs: int
    shard_bytes: int
    working_bytes: int
    plan: dict[str, Any]
    packages: dict[str, str]
    plugins: dict[str, tuple[str, str]]


def plan_of(
    source: Source,
    first: SplitQuantPass,
    backend: str,
    form: WeightFormat,
    shard_bytes: int,
    ignore: Sequence[str] | None,
) -> dict[str, Any]:
    """Return everything that the output depends on, as JSON has it; `ignore` are names of layers that stay float."""
    plan = {
        "checkpoint": source.fingerprint(),
        "config.json": (source.folder / "config.json").read_text("utf-8"),
        "backend": backend,
        "weight format": form.__dict__,
        IGNORED: ignore,
        "options": first.config.model_dump(mode="json"),
        "splitter options": first.splitter_options.model_dump(mode="json"),
        "version": version_of(),
        "shard size": shard_bytes,
    }
    answer: dict[str, Any] = json.loads(json.dumps(plan))
    return answer


def describe_job(
    source: Source,
    output: Path,
    first: SplitQuantPass,
    backend: Backend,
    plan: dict[str, Any],
    *,
    shard_bytes: int,
    working_bytes: int,
) -> Job:
    """Describe the work of a pass and a backend that are here for those that are elsewhere."""
    return Job(
        checkpoint=str(source.folder.resolve()),
        output=str(output.resolve()),
        backend=backend.name,
        weight_format=plan["weight format"],
        ignore=plan[IGNORED],
        options=plan["options"],
        splitter_options=plan["splitter options"],
        jobs=first.jobs,
        shard_bytes=shard_bytes,
        working_bytes=working_bytes,
        plan=plan,
        packages=_packages(backend),
        plugins=_plugins(first.plugins),
    )


def open_job(job: Job) -> Shards:
    """Make what does the work, from files and installed plugins.

    Raises ConfigError or InputError, with the remedy, where files, packages or plugins are not those that the job
    was described with; other errors as `stream_model` does.
    """
    plugins = Plugins.load()
    _refuse_other_plugins(job, plugins)
    backend = plugins.backend(job.backend)
    backend.require()
    place = Workplace(Path(job.output))
    checkpoint = Path(job.checkpoint)
    for path, option in ((checkpoint, "checkpoint"), (place.folder, "--output")):
        if not path.is_dir():
            raise InputError(f"{path} is not to be seen there; give a path of the {option} that all machines share")
    place.join(job.plan)
    form = WeightFormat(**job.weight_format)
    options = {name: value for name, value in job.options.items() if name != "k" or job.options["budget"] is None}
    first = SplitQuantPass(plugins=plugins, jobs=job.jobs, **options, **job.splitter_options)
    packer = backend.packer(form)
    if packer is None:
        raise ConfigError(f"backend {job.backend} cannot stream {form.weights} ({form.method})")
    packer.ignore = job.ignore
    source = Source(checkpoint)
    own = plan_of(source, first, job.backend, form, job.shard_bytes, job.ignore)
    different = [key for key in job.plan if own.get(key) != job.plan[key]]
    if different:
        raise InputError(
            f"{checkpoint} has another {different[0]} there; give a path that is the same storage on all machines"
        )
    parts = place.parts() if first.config.budget is not None else None
    return Shards(source, make_layout(source, first, packer, parts), first, packer, place, job.shard_bytes)


def _packages(backend: Backend) -> dict[str, str]:
    found = {package: version_of(package) for package in (*PACKAGES, *backend.packages)}
    return {package: version for package, version in found.items() if version != NOT_INSTALLED}


def _plugins(plugins: Plugins) -> dict[str, tuple[str, str]]:
    return {
        info.name: (info.source, info.version) for info in plugins.infos if not info.error and info.source != BUILT_IN
    }


def _refuse_other_plugins(job: Job, plugins: Plugins) -> None:
    here = _plugins(plugins)
    broken = {info.name: info.error for info in plugins.broken}
    for name, (source, version) in job.plugins.items():
        if name in broken:
            raise ConfigError(f"plugin {name} of {source} is broken there: {broken[name]}")
        if name not in here:
            raise ConfigError(f"plugin {name} of {source} {version} is missing there; install it")
        if here[name] != (source, version):
            raise ConfigError(
                f"plugin {name} is of {' '.join(here[name])} there, and of {source} {version} here; install the same"
            )
    more = sorted(here.keys() - job.plugins.keys())
    if more:
        raise ConfigError(
            f"plugin {more[0]} of {here[more[0]][0]} is not loaded here; install it here too, or start the worker with "
            f"SPLITQUANT_BLOCK_PLUGINS={more[0]}"
        )
