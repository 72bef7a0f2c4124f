"""How inputs and outputs nest, as JSON, and back: tuples, lists, dicts and transformers' outputs, and nothing else.

torch's own `treespec_loads` is not used: it imports whatever module a specification names. Here a file can only
choose among the containers that this module builds itself.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch.utils import _pytree as pytree

from splitquant_plugins.errors import InputError

OUTPUTS = "transformers.modeling_outputs"  # the only module whose classes a file may name, and it is not imported by it
DEEPEST = 32


def tree_to_json(spec: pytree.TreeSpec) -> Any:
    """Return a structure as JSON: None for a leaf; InputError for containers that are not listed above."""
    try:
        nest = pytree.tree_unflatten(range(spec.num_leaves), spec)
    except Exception as error:  # a container's own code puts it together, and it may want real tensors
        raise _unsupported(spec.type) from error
    return _encode(nest)


def tree_from_json(described: Any) -> pytree.TreeSpec:
    """Return the structure that `tree_to_json` described; ValueError for anything else."""
    return pytree.tree_structure(_decode(described, 0))


def _encode(nest: Any) -> Any:
    if type(nest) is int:
        return None
    if type(nest) in (tuple, list):
        return {type(nest).__name__: [_encode(child) for child in nest]}
    if type(nest) is dict and all(type(key) in (str, int) for key in nest):
        return {"dict": [[key, _encode(child)] for key, child in nest.items()]}
    if type(nest).__module__ == OUTPUTS:
        return {"output": [type(nest).__name__, [[key, _encode(child)] for key, child in nest.items()]]}
    raise _unsupported(type(nest))


def _unsupported(kind: Any) -> InputError:
    name = getattr(kind, "__name__", str(kind))
    return InputError(
        f"the model's inputs or outputs hold a {name}, which cannot be saved: use tensors in tuples, lists and dicts"
    )


def _decode(described: Any, depth: int) -> Any:
    if described is None:
        return 0
    if depth > DEEPEST:
        raise ValueError("its inputs or outputs nest too deeply")
    if not isinstance(described, dict) or len(described) != 1:
        raise ValueError("a structure is neither a leaf nor one container")
    ((kind, content),) = described.items()
    if kind in ("tuple", "list") and isinstance(content, list):
        children = [_decode(child, depth + 1) for child in content]
        return tuple(children) if kind == "tuple" else children
    if kind == "dict":
        return _pairs(content, (str, int), depth)
    if kind == "output" and isinstance(content, list) and len(content) == 2:
        made = _output_class(content[0])
        given = _pairs(content[1], (str,), depth)
        allowed = {field.name for field in fields(made)}
        if not given or not set(given) <= allowed:
            raise ValueError(f"a {content[0]} has no fields {sorted(set(given) - allowed)}")
        return made(**given)
    raise ValueError(f"{kind!r} is no container that is saved")


def _pairs(content: Any, kinds: tuple[type, ...], depth: int) -> dict[Any, Any]:
    if not isinstance(content, list):
        raise ValueError("a dict is not described by a list of pairs")
    found: dict[Any, Any] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in kinds or pair[0] in found:
            raise ValueError("a dict has a key that is no name, or has it twice")
        found[pair[0]] = _decode(pair[1], depth + 1)
    return found


def _output_class(name: Any) -> Any:
    import transformers.modeling_outputs as outputs
    from transformers.utils import ModelOutput

    made = vars(outputs).get(name) if isinstance(name, str) else None
    if not (isinstance(made, type) and issubclass(made, ModelOutput) and made.__module__ == OUTPUTS):
        raise ValueError(f"{name!r} is no output of transformers")
    return made
