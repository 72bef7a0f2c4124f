"""Making `from_pretrained` load a folder that was streamed: its tensors are those that `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from splitquant_plugins.checkpoints.files import read_json, write_json
from splitquant_plugins.checkpoints.source import INDEX_FILE, Source
from splitquant_plugins.checkpoints.tensors import state_bytes, write_tensors
from splitquant_plugins.manifest import Manifest
from splitquant_plugins.pretrained.guards import guards

if TYPE_CHECKING:
    from splitquant_plugins.checkpoints.saved_layers import SavedLayers

SHARD = "model-splitquant.safetensors"


def describe_streamed(folder: Path, backend: str, saved: SavedLayers) -> None:
    """Add to a sharded folder what `save_pretrained` would have said in config.json, and one more shard.

    The shard has the guards, and copies of the tensors that layers of one weight share. It is written first and named
    in the index last, so that the folder loads as before wherever this breaks off.
    """
    from splitquant_plugins.pretrained.checkpoint_config import SplitCheckpointConfig

    manifest = Manifest.load(folder)
    layers, same_as = saved.described_in(folder)
    split = [name for record in manifest.split for name in (record.name, *record.also_known_as)]
    inside = tuple(f"{name}." for name in (*split, *layers))
    source, index = Source(folder), read_json(folder / INDEX_FILE)
    in_split = tuple(f"{name}." for name in split)
    tensors = guards([*split, *(name for name in layers if not name.startswith(in_split))])
    tensors.update({name: source.read(kept) for name, kept in same_as.items() if name.startswith(inside)})
    write_tensors(folder / SHARD, tensors)
    config = read_json(folder / "config.json")
    described = SplitCheckpointConfig(manifest, backend, layers, config.get("dtype"))
    write_json(folder / "config.json", {**config, "quantization_config": described.to_dict()})
    index["weight_map"].update(dict.fromkeys(tensors, SHARD))
    index["metadata"]["total_size"] += state_bytes(tensors)
    write_json(folder / INDEX_FILE, {**index, "weight_map": dict(sorted(index["weight_map"].items()))})
