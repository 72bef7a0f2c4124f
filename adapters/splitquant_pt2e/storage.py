"""Saving a converted PT2E graph as safetensors and JSON, and loading it back.

A folder holds graph.json (the operators, with the scales and zero points that PT2E writes as numbers),
model.safetensors (codes, scales per channel and all other tensors that the graph reads) and, where the graph was
split, splitquant_manifest.json. Nothing is pickled, loading compiles no text of the files, and the graph runs no
operator outside an allow list.
"""

from __future__ import annotations

from pathlib import Path

from torch.fx import GraphModule

from splitquant_plugins.checkpoints.files import read_json, write_json
from splitquant_plugins.checkpoints.source import SINGLE_FILE
from splitquant_plugins.checkpoints.tensors import read_state, untied_state, write_tensors
from splitquant_plugins.errors import InputError, SkeletonMismatchError
from splitquant_plugins.manifest import ATTRIBUTE, FILE_NAME, Manifest, set_manifest
from splitquant_pt2e.graph_json import graph_from_json, graph_to_json
from splitquant_pt2e.layers import tensor_of
from splitquant_pt2e.stored_layers import stored_weights

GRAPH_FILE = "graph.json"


def save(model: GraphModule, folder: str | Path) -> None:
    """Save what convert_pt2e returned.

    Raises InputError where no weight of the graph is quantized, or where it holds what JSON cannot take.
    """
    folder = Path(folder)
    if not isinstance(model, GraphModule):
        raise InputError(f"save takes the graph module that convert_pt2e returned, not a {type(model).__name__}")
    described, targets = graph_to_json(model)
    if not any("quantize_per" in str(node.get("target")) for node in described["nodes"]):
        raise InputError("the graph is not quantized; call convert_pt2e before saving")
    readers = [node for node in model.graph.nodes if node.name in targets]
    state, same_as = untied_state({targets[node.name]: tensor_of(model, node) for node in readers})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / SINGLE_FILE, state)
    manifest = model.meta.get(ATTRIBUTE)
    has_manifest = isinstance(manifest, Manifest)
    write_json(folder / GRAPH_FILE, {**described, "same_as": same_as, "has_manifest": has_manifest})
    if isinstance(manifest, Manifest):
        manifest.save(folder)
    else:
        (folder / FILE_NAME).unlink(missing_ok=True)


def load(folder: str | Path) -> GraphModule:
    """Load what `save` saved: a graph module that gives identical outputs and needs no float model.

    It runs eagerly and under torch.compile, and can be exported again. Raises InputError for a missing or
    damaged file, SkeletonMismatchError where the files do not fit each other.
    """
    folder = Path(folder)
    path = folder / GRAPH_FILE
    described = read_json(path)
    if not isinstance(described, dict) or not isinstance(described.get("nodes"), list):
        raise InputError(f"{path} is damaged: it holds no graph")
    if not isinstance(described.get("has_manifest"), bool):
        raise InputError(f"{path} is damaged: it does not say whether there is a manifest")
    has_manifest = described["has_manifest"] or (folder / FILE_NAME).is_file()
    manifest = Manifest.load(folder) if has_manifest else None
    same_as = described.get("same_as")
    if not isinstance(same_as, dict) or not all(isinstance(kept, str) for kept in same_as.values()):
        raise InputError(f"{path} is damaged: it does not say which tensors are shared")
    state = read_state(folder, same_as)
    wanted = {str(e.get("target")) for e in described["nodes"] if isinstance(e, dict) and e.get("op") == "get_attr"}
    for missing in sorted(wanted - set(state)):
        raise SkeletonMismatchError(f"{folder}: the graph reads tensor {missing}, which {SINGLE_FILE} does not have")
    for unused in sorted(set(state) - wanted):
        raise SkeletonMismatchError(f"{folder}: {SINGLE_FILE} has tensor {unused}, which the graph does not read")
    model = graph_from_json(described, state, path)
    _refuse_misfit(model, manifest, folder)
    if manifest is not None:
        set_manifest(model, manifest)
        model.meta[ATTRIBUTE] = manifest
    return model.eval()


def _refuse_misfit(model: GraphModule, manifest: Manifest | None, folder: Path) -> None:
    """Refuse a graph whose quantized layers are not those of the manifest."""
    if manifest is None:
        return
    found = stored_weights(model)
    for record in manifest.split:
        parts = len(found.get(record.name, ()))
        if parts != record.k and not (parts and record.shared_with):
            raise SkeletonMismatchError(
                f"{folder}: {record.name} was split in {record.k}, and the graph quantizes {parts} weights of it"
            )
        if any(tuple(stored.weight.shape) != record.shape for stored in found[record.name]):
            raise SkeletonMismatchError(f"{folder}: {record.name} had shape {record.shape} when it was split")
