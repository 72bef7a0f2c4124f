"""Graphs that release 0.1.0 saved, as those of today: data into data, so that reading them is no less safe.

Their structures are the text of torch's `treespec_dumps`, which is taken apart here: torch's own reader imports what a
file names. They have no guards, and the names of their inputs are also the targets of nodes.
"""

from __future__ import annotations

import json
from typing import Any

EARLIER = 1
_OUTPUTS = "transformers.modeling_outputs."


def from_earlier(described: dict[str, Any], current: int) -> dict[str, Any]:
    """Return a described graph of format 1 as one of today's; raises LookupError, TypeError or ValueError."""
    nodes = [
        {key: value for key, value in node.items() if (node["op"], key) != ("placeholder", "target")}
        for node in described["nodes"]
    ]
    specs = {name: _tree(described[name]) for name in ("in_spec", "out_spec")}
    return {**described, **specs, "format": current, "guards": [], "nodes": nodes}


def _tree(text: Any) -> Any:
    """A structure as `tree_json` describes it; that the containers are known ones is seen when it is read."""
    if not isinstance(text, str):
        raise ValueError("a structure is no text")
    version, tree = json.loads(text)
    if version != 1:
        raise ValueError(f"a structure has version {version!r}")
    return _container(tree)


def _container(tree: dict[str, Any]) -> Any:
    kind, children = tree["type"], [_container(child) for child in tree["children_spec"]]
    if kind is None:
        return None
    if kind in ("builtins.tuple", "builtins.list"):
        return {kind.removeprefix("builtins."): children}
    pairs = [list(pair) for pair in zip(json.loads(tree["context"]), children, strict=True)]
    if kind == "builtins.dict":
        return {"dict": pairs}
    if kind.startswith(_OUTPUTS):
        return {"output": [kind.removeprefix(_OUTPUTS), pairs]}
    raise ValueError(f"{kind!r} is no container that is saved")
