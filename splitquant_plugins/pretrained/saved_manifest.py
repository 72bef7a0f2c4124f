"""The manifest of a saved model, wherever it stands: in a file of its own, or in config.json."""

from __future__ import annotations

from pathlib import Path

from splitquant_plugins.checkpoints.files import read_json
from splitquant_plugins.checkpoints.pretrained_config import is_pretrained
from splitquant_plugins.errors import InputError
from splitquant_plugins.manifest import FILE_NAME, Manifest, manifest_from


def manifest_in(folder: Path) -> Manifest:
    """Return the manifest of a folder that an adapter, `splitquant quantize` or `save_pretrained` wrote.

    Raises InputError where there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder with a split model")
    if not (folder / FILE_NAME).is_file() and is_pretrained(folder):
        described = read_json(folder / "config.json")["quantization_config"]
        return manifest_from(described.get("manifest"), f"{folder / 'config.json'}: quantization_config.manifest")
    return Manifest.load(folder)
